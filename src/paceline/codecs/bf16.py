"""bfloat16: the upper half of a float32, rounded to nearest even. Half the bytes, no scale needed.

Body: numel × bfloat16. Infinities and NaN travel.
"""

from __future__ import annotations

from typing import Any, final

import torch

from paceline.codecs.kernel import payload
from paceline.codecs.kernel.compiled import KernelCodec
from paceline.codecs.kernel.payload import PayloadHeader
from paceline.codecs.kernel.reference import keep_remainder
from paceline.errors import ProtocolError


@final
class Bf16(KernelCodec):
    """bfloat16: 2 bytes per element.

    Example:
        `all_reduce(codec=bf16)`
    """

    def arguments(self, x: torch.Tensor, state: dict[str, Any]) -> dict[str, Any]:
        return {}

    def reference_encode(
        self, x: torch.Tensor, residual: torch.Tensor | None, arguments: dict[str, Any]
    ) -> tuple[PayloadHeader, bytes]:
        """Round to nearest even; every NaN becomes the one quiet NaN."""
        value = x if residual is None else x + residual
        rounded = value.to(torch.bfloat16)
        code = torch.where(
            rounded.isnan(), torch.tensor(0x7FC0, dtype=torch.int16), rounded.view(torch.int16)
        )
        if residual is not None:
            keep_remainder(residual, value, code.view(torch.bfloat16).to(torch.float32))
        return PayloadHeader("bf16", x.numel()), payload.as_bytes(code)

    @classmethod
    def reference_decode(cls, header: PayloadHeader, body: bytes) -> torch.Tensor:
        if header.parameter != 0:
            raise ProtocolError("bf16 payload: it has no parameter")
        payload.check_body(header, body, 2 * header.numel)
        return payload.as_tensor(body, torch.bfloat16).to(torch.float32)
