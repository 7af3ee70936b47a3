"""What int8 and int4 share: q = round(x / scale) with one scale = max|x| / limit per block.

Rounding is to nearest even, or stochastic: floor(x / scale + u) with u from a counter-based generator.
Element i of encode number n is then rounded alike on every machine, and the expectation is the input.
"""

from __future__ import annotations

import abc
import hashlib
import struct
from typing import Any

import torch

from paceline.codecs.kernel import payload
from paceline.codecs.kernel.compiled import KernelCodec
from paceline.codecs.kernel.payload import PayloadHeader
from paceline.codecs.kernel.reference import in_blocks, keep_remainder, largest_bits
from paceline.errors import ConfigError


class Quantizer(KernelCodec):
    """Block-scaled integers; unbiased with stochastic rounding.

    Args:
        block: Elements that share a scale, a power of two from 32 to 4096.
        stochastic: Round at random, so that the expectation of the decoded value is the input.
        seed: Chooses the random stream, from 0 to 2^64 - 1.
    """

    limit: int
    """Largest code; the smallest is its negative."""

    def __init__(self, *, block: int, stochastic: bool, seed: int) -> None:
        if not payload.is_block(block):
            raise ConfigError(f"{self.name}: block must be a power of two from 32 to 4096, got {block!r}")
        if not isinstance(seed, int) or not 0 <= seed < 2**64:
            raise ConfigError(f"{self.name}: seed must be an integer from 0 to 2^64 - 1, got {seed!r}")
        self._block = block
        self._stochastic = bool(stochastic)
        self._seed = seed
        self.is_unbiased = self._stochastic

    @staticmethod
    @abc.abstractmethod
    def packed(codes: torch.Tensor) -> bytes:
        """Return the bytes of 1-D int8 codes."""

    def parameter(self, numel: int) -> int:
        return self._block

    def arguments(self, x: torch.Tensor, state: dict[str, Any]) -> dict[str, Any]:
        """Block length and, for stochastic rounding, a key that differs for every encode of every stream."""
        if not self._stochastic:
            return {"parameter": self._block}
        step = state["step"] = state.get("step", 0) + 1
        key = struct.pack("<QQQ", self._seed, state.get("stream", 0), step)
        digest = hashlib.blake2b(key, digest_size=8).digest()
        return {"parameter": self._block, "stochastic": True, "key": int.from_bytes(digest, "little")}

    def reference_encode(
        self, x: torch.Tensor, residual: torch.Tensor | None, arguments: dict[str, Any]
    ) -> tuple[PayloadHeader, bytes]:
        """Scale, round and clamp each block."""
        value = x if residual is None else x + residual
        rows = in_blocks(value, self._block)
        largest = largest_bits(rows)
        is_finite = largest < 0x7F800000
        scale = largest.view(torch.float32) / self.limit
        is_zero = ~is_finite | (scale.view(torch.int32) < 0x00800000)
        inverse = torch.where(is_zero, 0.0, 1.0 / scale)
        scale = torch.where(is_finite, torch.where(is_zero, 0.0, scale), torch.nan)
        scaled = (rows * inverse[:, None]).view(-1)[: x.numel()]
        if arguments.get("stochastic"):
            code = (scaled + uniform(arguments["key"], x.numel())).floor().clamp(-self.limit, self.limit)
        else:
            code = scaled.round()
        is_sent = ~is_zero.repeat_interleave(self._block)[: x.numel()]
        code = torch.where(is_sent, code, 0.0)
        if residual is not None:
            sent = code * scale.repeat_interleave(self._block)[: x.numel()]
            keep_remainder(residual, value, sent)
        body = payload.as_bytes(scale) + self.packed(code.to(torch.int8))
        return PayloadHeader(self.name, x.numel(), parameter=self._block), body


def uniform(key: int, count: int) -> torch.Tensor:
    """Return `count` float32 in (0, 1), odd multiples of 2^-17, from hashes under the two halves of `key`.

    The low and the high 16 bits of hash 16g + l serve elements 32g + l and 32g + 16 + l. That halves the
    number of hashes; the expectation is off by at most 2^-17 of a quantum, in either direction.
    """
    counter = torch.arange(-(-count // 32) * 16, dtype=torch.int64)
    low, high = key & 0xFFFFFFFF, key >> 32
    bits = _mixed(_mixed(counter + low & 0xFFFFFFFF) ^ high).view(-1, 1, 16)
    halves = torch.cat([bits & 0xFFFF, bits >> 16], dim=1).view(-1)[:count]
    return halves.to(torch.float32) * 2.0**-16 + 2.0**-17


def _mixed(z: torch.Tensor) -> torch.Tensor:
    """A 32-bit integer hash with good avalanche, computed in int64 to avoid signs."""
    z = (z ^ z >> 16) * 0x7FEB352D & 0xFFFFFFFF
    z = (z ^ z >> 15) * 0x846CA68B & 0xFFFFFFFF
    return z ^ z >> 16


def dequantized(header: PayloadHeader, codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """Multiply each code by the scale of its block."""
    return (in_blocks(codes, header.parameter) * scales[:, None]).view(-1)[: header.numel]
