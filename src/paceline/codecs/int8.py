"""8-bit integers with one float scale per block, optionally with stochastic (unbiased) rounding.

Body: blocks × f32 scale, then numel × int8. A block that holds infinity or NaN decodes to NaN.
"""

from __future__ import annotations

from typing import final

import torch

from paceline.codecs.kernel import payload
from paceline.codecs.kernel.payload import PayloadHeader
from paceline.codecs.kernel.quantize import Quantizer, dequantized


@final
class Int8(Quantizer):
    """8-bit integers: 1 byte per element and 4 bytes per block.

    Args:
        block: Elements that share a scale, a power of two from 32 to 4096; default 256. Smaller blocks follow
            the values more closely, for 4 bytes more per block.
        stochastic: Round at random, so that the expectation of the decoded value is the input; default
            false: to the nearest. Choose it without error feedback when the bias of rounding matters.
        seed: Seed of that randomness, from 0 to 2^64 - 1; default 0.

    Raises:
        ConfigError: A block length or seed that is not allowed.

    Example:
        `all_reduce(codec=error_feedback(codec=int8))`
    """

    limit = 127

    def __init__(self, *, block: int = 256, stochastic: bool = False, seed: int = 0) -> None:
        super().__init__(block=block, stochastic=stochastic, seed=seed)

    @staticmethod
    def packed(codes: torch.Tensor) -> bytes:
        return payload.as_bytes(codes)

    @classmethod
    def reference_decode(cls, header: PayloadHeader, body: bytes) -> torch.Tensor:
        blocks = payload.num_blocks(header.numel, payload.check_block(header))
        payload.check_body(header, body, 4 * blocks + header.numel)
        codes = payload.as_tensor(body[4 * blocks :], torch.int8).to(torch.float32)
        return dequantized(header, codes, payload.as_tensor(body[: 4 * blocks], torch.float32))
