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
    """4-bit integers: half a byte per element and 4 bytes per block.

    Args:
        block: Elements that share a scale, a power of two from 32 to 4096; default 128. Smaller blocks follow
            the values more closely, for 4 bytes more per block.
        stochastic: Round at random, so that the expectation of the decoded value is the input; default
            false: to the nearest. Choose it without error feedback when the bias of rounding matters.
        seed: Seed of that randomness, from 0 to 2^64 - 1; default 0.

    Raises:
        ConfigError: A block length or seed that is not allowed.

    Example:
        `diloco(codec=error_feedback(codec=int4))`
    """

    limit = 7

    def __init__(self, *, block: int = 128, stochastic: bool = False, seed: int = 0) -> None:
        super().__init__(block=block, stochastic=stochastic, seed=seed)

    @staticmethod
    def packed(codes: torch.Tensor) -> bytes:
        halves = (in_blocks(codes, 32) + 8).to(torch.uint8).view(-1, 2, 16)
        return payload.as_bytes(halves[:, 0] | halves[:, 1] << 4)

    @classmethod
    def reference_decode(cls, header: PayloadHeader, body: bytes) -> torch.Tensor:
        blocks = payload.num_blocks(header.numel, payload.check_block(header))
        payload.check_body(header, body, 4 * blocks + 16 * payload.num_blocks(header.numel, 32))
        halves = payload.as_tensor(body[4 * blocks :], torch.uint8).view(-1, 16)
        codes = torch.stack([halves & 15, halves >> 4], dim=1).view(-1)[: header.numel]
        values = codes.to(torch.float32) - 8.0
        return dequantized(header, values, payload.as_tensor(body[: 4 * blocks], torch.float32))
