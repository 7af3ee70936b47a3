"""4-bit integers with one float scale per block, optionally with stochastic (unbiased) rounding.

Body: blocks × f32 scale, then groups of 32 elements in 16 bytes: byte i holds element i in its low half and
element i + 16 in its high half, each as code + 8. A block that holds infinity or NaN decodes to NaN.
"""

from __future__ import annotations

from typing import final

import torch

from paceline.codecs.kernel import payload
from paceline.codecs.kernel.payload import PayloadHeader
from paceline.codecs.kernel.quantize import Quantizer, dequantized
from paceline.codecs.kernel.reference import in_blocks


@final
class Int4(Quantizer):
    """`int4(block=128, stochastic=false, seed=0)`: half a byte per element and 4 bytes per block."""

    limit = 7

    def __init__(self, *, block: int = 128, stochastic: bool = False, seed: int = 0) -> None:
        super().__init__(block=block, stochastic=stochastic, seed=seed)

    @staticmethod
    def packed(codes: torch.Tensor) -> bytes:
        """Two codes per byte."""
        halves = (in_blocks(codes, 32) + 8).to(torch.uint8).view(-1, 2, 16)
        return payload.as_bytes(halves[:, 0] | halves[:, 1] << 4)

    @classmethod
    def reference_decode(cls, header: PayloadHeader, body: bytes) -> torch.Tensor:
        """(half byte - 8) · scale."""
        blocks = payload.num_blocks(header.numel, payload.check_block(header))
        payload.check_body(header, body, 4 * blocks + 16 * payload.num_blocks(header.numel, 32))
        halves = payload.as_tensor(body[4 * blocks :], torch.uint8).view(-1, 16)
        codes = torch.stack([halves & 15, halves >> 4], dim=1).view(-1)[: header.numel]
        values = codes.to(torch.float32) - 8.0
        return dequantized(header, values, payload.as_tensor(body[: 4 * blocks], torch.float32))
