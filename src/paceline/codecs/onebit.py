"""One sign bit per element and one scale, the mean magnitude, per block: 1/30 of the bytes.

Biased: wrap it in error_feedback. The scale travels as bfloat16: its rounding costs no accuracy under error
feedback and keeps residuals of integers exact.

Body: blocks × bfloat16 scale, then one bit per element, least bit first, 1 for negative.
"""

from __future__ import annotations

from typing import Any, final

import numpy as np
import torch

from paceline.codecs.kernel import payload
from paceline.codecs.kernel.compiled import KernelCodec
from paceline.codecs.kernel.payload import PayloadHeader
from paceline.codecs.kernel.reference import in_blocks, keep_remainder
from paceline.errors import ConfigError

_MOST = 4096.0
"""The longest block; a power of two, so that dividing by it only moves the exponent."""


def _sums_of_magnitudes(rows: torch.Tensor) -> torch.Tensor:
    """Return the sum of |x| of each row: 16 lanes, then their halves."""
    lanes = torch.zeros(rows.shape[0], 16)
    for group in rows.abs().view(rows.shape[0], rows.shape[1] // 16, 16).unbind(1):
        lanes = lanes + group
    while lanes.shape[1] > 1:
        half = lanes.shape[1] // 2
        lanes = lanes[:, :half] + lanes[:, half:]
    return lanes[:, 0]


@final
class Onebit(KernelCodec):
    """One bit per element and 2 bytes per block.

    Args:
        block: Elements that share a scale, a power of two from 32 to 4096; default 512. Smaller blocks follow
            the values more closely, for 2 bytes more per block; 32 under momentum at a high learning rate.

    Raises:
        ConfigError: A block length that is not allowed.

    Example:
        `local_sgd(codec=error_feedback(codec=onebit))`

    Source: Seide et al., Interspeech 2014.
    """

    def __init__(self, *, block: int = 512) -> None:
        if not payload.is_block(block):
            raise ConfigError(f"onebit: block must be a power of two from 32 to 4096, got {block!r}")
        self._block = block

    def parameter(self, numel: int) -> int:
        return self._block

    def arguments(self, x: torch.Tensor, state: dict[str, Any]) -> dict[str, Any]:
        return {"parameter": self._block}

    def reference_encode(
        self, x: torch.Tensor, residual: torch.Tensor | None, arguments: dict[str, Any]
    ) -> tuple[PayloadHeader, bytes]:
        """scale = mean |x|, summed in 16 lanes so that every implementation rounds alike; bit = sign.

        Where the sum overflows, it is formed again of values divided by the longest block.
        """
        value = x if residual is None else x + residual
        rows = in_blocks(value, self._block)
        starts = torch.arange(rows.shape[0]) * self._block
        lengths = (x.numel() - starts).clamp(max=self._block)
        total = _sums_of_magnitudes(rows)
        smaller = _sums_of_magnitudes(rows / _MOST) / lengths * _MOST
        mean = torch.where(total.isinf(), smaller, total / lengths)
        scale = mean.to(torch.bfloat16)
        # A finite mean stays finite where rounding to nearest would not.
        scale = torch.where(scale.isinf() & mean.isfinite(), torch.finfo(torch.bfloat16).max, scale)
        scale = torch.where(scale.isnan(), torch.nan, scale)  # one NaN pattern
        is_negative = value.signbit()
        if residual is not None:
            each = scale.to(torch.float32).repeat_interleave(self._block)[: x.numel()]
            keep_remainder(residual, value, torch.where(is_negative, -each, each))
        signs = np.packbits(is_negative.cpu().numpy(), bitorder="little").tobytes()
        return PayloadHeader("onebit", x.numel(), parameter=self._block), payload.as_bytes(scale) + signs

    @classmethod
    def reference_decode(cls, header: PayloadHeader, body: bytes) -> torch.Tensor:
        blocks = payload.num_blocks(header.numel, payload.check_block(header))
        payload.check_body(header, body, 2 * blocks + (header.numel + 7) // 8)
        scales = payload.as_tensor(body[: 2 * blocks], torch.bfloat16).to(torch.float32)
        bits = np.unpackbits(np.frombuffer(body[2 * blocks :], np.uint8), bitorder="little")
        each = scales.repeat_interleave(header.parameter)[: header.numel]
        return torch.where(torch.from_numpy(bits[: header.numel].astype(bool)), -each, each)
