"""Gradient compression on the way: `Compression.none`, `Compression.fp16`, and bf16 beside them."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor


class Compressor(ABC):
    """Two static functions: what travels, and how it comes back."""

    @staticmethod
    @abstractmethod
    def compress(tensor: Tensor) -> tuple[Tensor, torch.dtype | None]:
        """Return the tensor to send and what `decompress` needs."""

    @staticmethod
    @abstractmethod
    def decompress(tensor: Tensor, ctx: torch.dtype | None) -> Tensor:
        """Return the received tensor in its original type."""


class NoneCompressor(Compressor):
    """Sends what it gets."""

    @staticmethod
    def compress(tensor: Tensor) -> tuple[Tensor, torch.dtype | None]:
        """Return the tensor itself."""
        return tensor, None

    @staticmethod
    def decompress(tensor: Tensor, ctx: torch.dtype | None) -> Tensor:
        """Return the tensor itself."""
        return tensor


def _narrow(tensor: Tensor, dtype: torch.dtype) -> tuple[Tensor, torch.dtype | None]:
    if tensor.dtype.is_floating_point and tensor.dtype.itemsize > dtype.itemsize:
        return tensor.to(dtype), tensor.dtype
    return tensor, None


class FP16Compressor(Compressor):
    """Floating point tensors travel as float16."""

    @staticmethod
    def compress(tensor: Tensor) -> tuple[Tensor, torch.dtype | None]:
        """Return a float16 copy; integers stay."""
        return _narrow(tensor, torch.float16)

    @staticmethod
    def decompress(tensor: Tensor, ctx: torch.dtype | None) -> Tensor:
        """Return the original type."""
        return tensor if ctx is None else tensor.to(ctx)


class BF16Compressor(Compressor):
    """Floating point tensors travel as bfloat16: less precision, no overflow. Not part of Horovod."""

    @staticmethod
    def compress(tensor: Tensor) -> tuple[Tensor, torch.dtype | None]:
        """Return a bfloat16 copy; integers stay."""
        return _narrow(tensor, torch.bfloat16)

    @staticmethod
    def decompress(tensor: Tensor, ctx: torch.dtype | None) -> Tensor:
        """Return the original type."""
        return tensor if ctx is None else tensor.to(ctx)


class Compression:
    """The choices for `DistributedOptimizer(compression=…)`."""

    none = NoneCompressor
    fp16 = FP16Compressor
    bf16 = BF16Compressor
