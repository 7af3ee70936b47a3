"""±τ updates with a residual: what has not reached τ is kept until it does.

    r ← r + x;  where |r_i| ≥ τ send (i, sign) and r_i ← r_i − sign·τ

Σ sent + r = Σ x always holds. Elements that are not finite are neither sent nor kept, and are counted.

Body: increasing u32 words, index | sign << 31; or, when more than numel / 16 elements are hit, two 16-bit
masks (+τ, −τ) per 16 elements; or, with `entropy`, the Golomb–Rice code of the words where that is shorter.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, final

import numpy as np
import torch

from paceline.codecs.kernel import payload
from paceline.codecs.kernel.compiled import KernelCodec
from paceline.codecs.kernel.payload import BITMAP, RICE, WORDS, PayloadHeader
from paceline.codecs.kernel.reference import plan_rice, read_rice, scatter, write_rice
from paceline.errors import ConfigError, ProtocolError

_STEP = 0.5 ** (1 / 20)  # τ halves or doubles in 20 encodes that miss the target by a little
_SAMPLE = 65536


@final
class Threshold(KernelCodec):
    """±τ for each element whose accumulated value has reached it (0.1 %): at most 4 bytes each.

    Args:
        tau: τ, in units of the tensor, from 1e-30 to 1e30. Alone: τ is fixed. With `density`: the first τ.
            Default: the quantile of the first tensor that `density` says. A smaller τ sends more.
        density: Share of elements to send, in (0, 0.5]; default 0.001 if `tau` is not given. Each tensor
            (bucket) then has its own τ, which adapts to keep the share of hits within
            [density / band, density · band]. Raise it when training falls behind.
        band: Tolerance of `density`, a factor of at least 1; default 2. 1 adapts τ at every encode.
        entropy: Code the gaps between hits with Golomb–Rice codes; default false. Fewer bytes for more CPU
            time.

    Raises:
        ConfigError: An argument outside of its range.

    Example:
        `all_reduce(codec=threshold(density=0.001, entropy=true))`

    Source: Strom, Interspeech 2015.
    """

    is_sparse = True
    keeps_residual = True

    def __init__(
        self,
        *,
        tau: float | None = None,
        density: float | None = None,
        band: float = 2.0,
        entropy: bool = False,
    ) -> None:
        if tau is not None and not 1e-30 <= tau <= 1e30:
            raise ConfigError(f"threshold: tau must be from 1e-30 to 1e30, got {tau!r}")
        if density is not None and not 0 < density <= 0.5:
            raise ConfigError(f"threshold: density must be in (0, 0.5], got {density!r}")
        if not band >= 1:
            raise ConfigError(f"threshold: band must be at least 1, got {band!r}")
        self._tau = tau
        self._density = 1e-3 if tau is None and density is None else density
        self._band = float(band)
        self._entropy = bool(entropy)

    def encode(
        self, x: torch.Tensor, state: dict[str, Any], *, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Add x to the residual in the state and encode the elements that have reached ±τ."""
        if "residual" not in state:
            state["residual"] = torch.zeros(x.numel(), dtype=torch.float32, device=x.device)
        return self.encode_with_residual(x, state["residual"], state, out=out)

    def arguments(self, x: torch.Tensor, state: dict[str, Any]) -> dict[str, Any]:
        if "tau" not in state:
            tau = self._tau
            if tau is None:
                tau = self._quantile(x)
                if tau == 0.0:  # all zero: nothing to send, and no quantile to start from
                    return {"tau": 1.0, "entropy": self._entropy}
            state["tau"] = float(np.float32(tau))
        return {"tau": state["tau"], "entropy": self._entropy}

    def _quantile(self, x: torch.Tensor) -> float:
        assert self._density is not None
        sample = x[:: max(1, x.numel() // _SAMPLE)].abs()
        sample = sample[sample.isfinite()]
        if sample.numel() == 0:
            return 0.0
        rank = max(1, sample.numel() - round(self._density * sample.numel()))
        return float(sample.kthvalue(rank).values.clamp(max=1e30)) or float(sample.max().clamp(max=1e30))

    def encoded(self, header: PayloadHeader, state: dict[str, Any]) -> None:
        """Move τ towards the target density."""
        if self._density is None or "tau" not in state or header.numel == 0:
            return
        density, tau = header.count / header.numel, state["tau"]
        if density < self._density / self._band:
            tau = max(tau * _STEP, 1e-30)
        elif density > self._density * self._band:
            # Momentum makes updates ten times larger in a few steps: far above the target τ follows faster.
            octaves = math.floor(math.log2(density / (self._density * self._band)))
            tau = min(tau / _STEP ** (1 + octaves), 1e30)
        state["tau"] = float(np.float32(tau))

    def reference_encode(
        self, x: torch.Tensor, residual: torch.Tensor | None, arguments: dict[str, Any]
    ) -> tuple[PayloadHeader, bytes]:
        """Compare, take ±τ off the residual, lay out the hits."""
        assert residual is not None
        tau = arguments["tau"]
        value = residual + x
        is_hit = value.isfinite() & (value.abs() >= tau)
        sent = torch.where(is_hit, torch.copysign(torch.tensor(tau), value), 0.0)
        residual.copy_(torch.where(value.isfinite(), value - sent, residual))
        indexes = is_hit.nonzero().view(-1).cpu()
        is_negative = value.cpu()[indexes].signbit()
        header = PayloadHeader("threshold", x.numel(), scale=tau, count=len(indexes))
        if len(indexes) > x.numel() // 16:
            return dataclasses.replace(header, layout=BITMAP), _bitmap(x.numel(), indexes, is_negative)
        words = indexes.numpy().astype("<u4") | is_negative.numpy().astype("<u4") << 31
        if arguments["entropy"]:
            parameter, num_bytes = plan_rice(indexes.tolist(), has_sign=True)
            if num_bytes < words.nbytes:
                body = write_rice(indexes.tolist(), is_negative.int().tolist(), parameter)
                return dataclasses.replace(header, layout=RICE, parameter=parameter), body
        return header, words.tobytes()

    @classmethod
    def reference_decode(cls, header: PayloadHeader, body: bytes) -> torch.Tensor:
        """±τ where the body says so, else 0."""
        if not 0.0 < header.scale < float("inf"):
            raise ProtocolError("threshold payload: tau is not positive and finite")
        if header.layout == RICE:
            found, signs = read_rice(header, body, has_sign=True)
            return _scattered(header, torch.tensor(found, dtype=torch.int64), torch.tensor(signs))
        if header.parameter != 0:
            raise ProtocolError("threshold payload: only its entropy-coded form has a parameter")
        if header.layout == WORDS:
            payload.check_body(header, body, 4 * header.count)
            words = torch.from_numpy(np.frombuffer(body, "<u4").astype(np.int64))
            return _scattered(header, words & 0x7FFFFFFF, words >> 31)
        return _from_bitmap(header, body)


def _scattered(header: PayloadHeader, indexes: torch.Tensor, is_negative: torch.Tensor) -> torch.Tensor:
    signs = 1.0 - 2.0 * is_negative.to(torch.float32)
    return scatter(header, indexes, header.scale * signs)


def _bitmap(numel: int, indexes: torch.Tensor, is_negative: torch.Tensor) -> bytes:
    """Two masks, +τ and −τ, for every 16 elements."""
    masks = np.zeros((payload.num_blocks(numel, 16), 2, 16), np.uint8)
    masks[indexes // 16, is_negative.to(torch.int64), indexes % 16] = 1
    return np.packbits(masks, bitorder="little").tobytes()


def _from_bitmap(header: PayloadHeader, body: bytes) -> torch.Tensor:
    payload.check_body(header, body, 4 * payload.num_blocks(header.numel, 16))
    masks = np.unpackbits(np.frombuffer(body, np.uint8), bitorder="little").reshape(-1, 2, 16)
    plus = torch.from_numpy(masks[:, 0].reshape(-1).astype(np.int64))
    minus = torch.from_numpy(masks[:, 1].reshape(-1).astype(np.int64))
    if bool((plus & minus).any()) or int((plus + minus).sum()) != header.count:
        raise ProtocolError("threshold payload: an element is hit twice, or the count of hits is wrong")
    if bool((plus + minus)[header.numel :].any()):
        raise ProtocolError("threshold payload: a hit beyond the tensor's end")
    return header.scale * (plus - minus)[: header.numel].to(torch.float32)
