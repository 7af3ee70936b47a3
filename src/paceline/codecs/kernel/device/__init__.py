"""Codecs for tensors on a GPU: Triton kernels that make the same payloads as the C++ kernels, bit by bit.

They are chosen by themselves for CUDA tensors where Triton can be imported. Nothing here imports Triton, or
touches CUDA, before such a tensor comes. What has no kernel (the Rice code) goes through the CPU's kernels.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

from paceline.codecs.kernel import payload
from paceline.codecs.kernel.payload import HEADER_BYTES, RICE, PayloadHeader

_FAMILIES = {
    "fp16": "halves",
    "bf16": "halves",
    "int8": "integers",
    "int4": "integers",
    "onebit": "onebit",
    "threshold": "threshold",
    "topk": "topk",
}
_ALIGN_BYTES = 16  # of payloads in device memory; kernels store whole words


def has_kernels(device: torch.device) -> bool:
    """Whether tensors of `device` are encoded there: a CUDA device, and Triton is installed."""
    return device.type == "cuda" and _triton_is_installed()


def can_encode(codec: str, device: torch.device, arguments: dict[str, Any]) -> bool:
    """Whether `encode` works here; the Rice code of `entropy` has no kernel."""
    return codec in _FAMILIES and not arguments.get("entropy") and has_kernels(device)


def can_decode(header: PayloadHeader, device: torch.device) -> bool:
    """Whether `decode` works for a payload with this header into a tensor of `device`."""
    return header.codec in _FAMILIES and header.layout != RICE and has_kernels(device)


def encode(
    codec: str,
    x: torch.Tensor,
    residual: torch.Tensor | None,
    arguments: dict[str, Any],
    *,
    capacity: int,
    source: int = 0,
    has_checksum: bool = False,
    out: torch.Tensor | None = None,
) -> tuple[torch.Tensor, PayloadHeader, int]:
    """Encode a flat tensor where it lies.

    `x`: contiguous 1-D float32 on the device. `residual`: like x, or None; x + residual is sent, and what was
    not sent is left in it. `arguments`: the codec's own (block length, tau, key …). `capacity`: bytes of the
    payload at most. `source`: the header's number of the dtype that x had. `out`: uint8 of `capacity` bytes
    on any device, or None. A checksum is computed on the CPU, which costs a copy of the payload.

    Returns (payload, its header, number of elements that were not finite and left out): the payload is a
    slice of `out`, or a new tensor beside x.
    """
    is_ready = out is not None and out.device == x.device and out.data_ptr() % _ALIGN_BYTES == 0
    target = out if is_ready else torch.empty(capacity, dtype=torch.uint8, device=x.device)
    assert target is not None
    with torch.cuda.device_of(x):
        plain, body_bytes, skipped = _function("encode", codec)(x, residual, target[HEADER_BYTES:], arguments)
    header = dataclasses.replace(plain, source=source, has_checksum=has_checksum)
    encoded = target[: HEADER_BYTES + body_bytes]
    body = payload.as_bytes(encoded[HEADER_BYTES:]) if has_checksum else b""
    head = payload.join(header, body)[:HEADER_BYTES]
    encoded[:HEADER_BYTES].copy_(_on_device(head, x.device))
    if out is not None and not is_ready:
        encoded = out[: encoded.numel()].copy_(encoded)
    return encoded, header, skipped


def decode(
    encoded: torch.Tensor, header: PayloadHeader, out: torch.Tensor, *, accumulate: bool = False
) -> None:
    """Decode a payload into `out`, or add it.

    `encoded`: contiguous uint8 on any device, whose `header` has been checked. `out`: contiguous 1-D float32
    on the device. Raises ProtocolError, leaving `out` untouched, for a body that does not fit its header.
    """
    body = encoded[HEADER_BYTES:].to(out.device)
    if body.data_ptr() % _ALIGN_BYTES:
        body = body.clone()
    with torch.cuda.device_of(out):
        _function("decode", header.codec)(header, body, out, accumulate)


def read_header(encoded: torch.Tensor) -> PayloadHeader:
    """Read and check the header of a payload on any device; ProtocolError when it is damaged.

    Waits for the device if the payload lies on one. The body is read only for a checksum.
    """
    head = payload.as_bytes(encoded[:HEADER_BYTES])
    is_short = len(head) < HEADER_BYTES or not head[7] & 1
    return payload.read(head if is_short else head + payload.as_bytes(encoded[HEADER_BYTES:]))


@functools.cache
def _triton_is_installed() -> bool:
    return importlib.util.find_spec("triton") is not None


@functools.cache
def _function(what: str, codec: str) -> Callable[..., Any]:
    module = importlib.import_module(f"{__name__}.{_FAMILIES[codec]}")
    found: Callable[..., Any] = getattr(module, f"{what}_{codec}")
    return found


@functools.lru_cache(maxsize=256)
def _on_device(head: bytes, device: torch.device) -> torch.Tensor:
    """A header in device memory. Dense codecs repeat theirs, so that they need no copy from the CPU."""
    return payload.as_tensor(head, torch.uint8).to(device)


__all__ = ["can_decode", "can_encode", "decode", "encode", "has_kernels", "read_header"]
