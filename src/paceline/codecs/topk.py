"""The k largest magnitudes with their exact values; ties go to the lowest index.

Biased: wrap it in error_feedback.

Body: k × f32 value, then k increasing u32 indexes, or with `entropy` the Golomb–Rice code of their gaps.
"""

from __future__ import annotations

import dataclasses
import struct
from typing import Any, final

import numpy as np
import torch

from paceline.codecs.kernel import payload
from paceline.codecs.kernel.compiled import KernelCodec
from paceline.codecs.kernel.payload import RICE, WORDS, PayloadHeader
from paceline.codecs.kernel.reference import plan_rice, read_rice, scatter, write_rice
from paceline.errors import ConfigError, ProtocolError
from paceline.spec import whole_number


@final
class Topk(KernelCodec):
    """The largest elements, 1 % unless told otherwise: at most 8 bytes per element sent.

    Args:
        density: Share of elements to send, in (0, 1]; default 0.01. Not together with `k`. Raise it when
            training falls behind that without a codec.
        k: Number of elements to send per tensor, at least 1; default none: `density` decides.
        entropy: Code the indexes with Golomb–Rice codes; default false. Fewer bytes for more CPU time.

    Raises:
        ConfigError: Both `density` and `k`, or one outside of its range.

    Example:
        `all_reduce(codec=error_feedback(codec=topk(density=0.01)))`

    Source: Aji & Heafield, EMNLP 2017; Stich et al., NeurIPS 2018.
    """

    is_sparse = True

    def __init__(self, *, density: float | None = None, k: int | None = None, entropy: bool = False) -> None:
        if density is not None and k is not None:
            raise ConfigError("topk: give density or k, not both")
        if density is not None and not 0 < density <= 1:
            raise ConfigError(f"topk: density must be in (0, 1], got {density!r}")
        self._density = 0.01 if density is None else density
        self._k = None if k is None else whole_number("topk: k", k, least=1)
        self._entropy = bool(entropy)

    def parameter(self, numel: int) -> int:
        """Return the number of elements that are sent."""
        wanted = self._k if self._k is not None else max(1, round(self._density * numel))
        return min(wanted, numel)

    def arguments(self, x: torch.Tensor, state: dict[str, Any]) -> dict[str, Any]:
        return {"parameter": self.parameter(x.numel()), "entropy": self._entropy}

    def reference_encode(
        self, x: torch.Tensor, residual: torch.Tensor | None, arguments: dict[str, Any]
    ) -> tuple[PayloadHeader, bytes]:
        """Choose by magnitude (NaN above infinity above numbers); send in ascending order of the index."""
        value = x if residual is None else x + residual
        magnitude = value.view(torch.int32) & 0x7FFFFFFF
        order = magnitude.sort(descending=True, stable=True).indices
        indexes = order[: arguments["parameter"]].sort().values
        sent = value[indexes]
        if residual is not None:
            residual.copy_(torch.where(value.isfinite(), value, 0.0))
            residual[indexes] = 0.0
        plain = PayloadHeader("topk", x.numel(), count=len(indexes))
        if arguments["entropy"]:
            parameter, num_bytes = plan_rice(indexes.tolist(), has_sign=False)
            if num_bytes < 4 * len(indexes):
                coded = write_rice(indexes.tolist(), None, parameter)
                header = dataclasses.replace(plain, layout=RICE, parameter=parameter)
                return header, payload.as_bytes(sent) + coded
        return plain, payload.as_bytes(sent) + indexes.cpu().numpy().astype("<u4").tobytes()

    @classmethod
    def reference_decode(cls, header: PayloadHeader, body: bytes) -> torch.Tensor:
        """Values at the indexes of the body, 0 elsewhere."""
        if struct.pack("<f", header.scale) != bytes(4):
            raise ProtocolError("topk payload: it has no tau")
        values, coded = body[: 4 * header.count], body[4 * header.count :]
        if header.layout == WORDS:
            if header.parameter != 0:
                raise ProtocolError("topk payload: only its entropy-coded form has a parameter")
            payload.check_body(header, body, 8 * header.count)
            indexes = torch.from_numpy(np.frombuffer(coded, "<u4").astype(np.int64))
        elif header.layout == RICE and len(values) == 4 * header.count:
            indexes = torch.tensor(read_rice(header, coded, has_sign=False)[0], dtype=torch.int64)
        else:
            raise ProtocolError("topk payload: its layout is unknown, or it ends before its values do")
        return scatter(header, indexes, payload.as_tensor(values, torch.float32))
