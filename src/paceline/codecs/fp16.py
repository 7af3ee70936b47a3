"""Half precision with one power-of-two scale per block: no overflow, least underflow, half the bytes.

Body: blocks × f32 scale, then numel × float16. Each block is scaled so that its largest magnitude lies in
[2^14, 2^15); decoded value = half · scale. Infinities and NaN travel.
"""

from __future__ import annotations

from typing import Any, final

import torch

from paceline.codecs.kernel import payload
from paceline.codecs.kernel.compiled import KernelCodec
from paceline.codecs.kernel.payload import PayloadHeader
from paceline.codecs.kernel.reference import in_blocks, keep_remainder, largest_bits
from paceline.errors import ConfigError


@final
class Fp16(KernelCodec):
    """Half precision: 2 bytes per element and 4 bytes per block.

    Args:
        block: Elements that share a scale, a power of two from 32 to 4096; default 1024. Smaller blocks
            follow the values more closely, for 4 bytes more per block.

    Raises:
        ConfigError: A block length that is not allowed.

    Example:
        `all_reduce(codec=fp16)`
    """

    def __init__(self, *, block: int = 1024) -> None:
        if not payload.is_block(block):
            raise ConfigError(f"fp16: block must be a power of two from 32 to 4096, got {block!r}")
        self._block = block

    def parameter(self, numel: int) -> int:
        return self._block

    def arguments(self, x: torch.Tensor, state: dict[str, Any]) -> dict[str, Any]:
        return {"parameter": self._block}

    def reference_encode(
        self, x: torch.Tensor, residual: torch.Tensor | None, arguments: dict[str, Any]
    ) -> tuple[PayloadHeader, bytes]:
        """Scale each block by a power of two, round to nearest even."""
        value = x if residual is None else x + residual
        rows = in_blocks(value, self._block)
        largest = largest_bits(rows)
        exponent = (268 - (largest >> 23)).clamp(max=253)
        exponent = torch.where((largest == 0) | (largest >= 0x7F800000), 127, exponent).to(torch.int32)
        up = (exponent << 23).view(torch.float32)[:, None]
        down = (254 - exponent << 23).view(torch.float32)[:, None]
        half = (rows * up).to(torch.float16)
        code = torch.where(half.isnan(), torch.tensor(0x7E00, dtype=torch.int16), half.view(torch.int16))
        if residual is not None:
            sent = code.view(torch.float16).to(torch.float32) * down
            keep_remainder(residual, value, sent.view(-1)[: x.numel()])
        body = payload.as_bytes(down) + payload.as_bytes(code.view(-1)[: x.numel()])
        return PayloadHeader("fp16", x.numel(), parameter=self._block), body

    @classmethod
    def reference_decode(cls, header: PayloadHeader, body: bytes) -> torch.Tensor:
        block = payload.check_block(header)
        blocks = payload.num_blocks(header.numel, block)
        payload.check_body(header, body, 4 * blocks + 2 * header.numel)
        scales = payload.as_tensor(body[: 4 * blocks], torch.float32)
        half = payload.as_tensor(body[4 * blocks :], torch.float16).to(torch.float32)
        return (in_blocks(half, block) * scales[:, None]).view(-1)[: header.numel]
