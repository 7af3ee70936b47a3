"""Codecs with a C++ kernel for CPU tensors; the readable reference runs on other devices and on request.

Every wire format exists twice: as a kernel in csrc/core/codecs, which gets what `arguments` returns, and in
PyTorch, in `reference_encode` and `reference_decode`. Tests compare them bit by bit.
"""

from __future__ import annotations

import abc
import dataclasses
import time
from typing import Any

import torch

from paceline import core
from paceline.codecs.kernel import device, ledger, payload
from paceline.codecs.kernel.codec import Codec, decode_any
from paceline.codecs.kernel.payload import PayloadHeader
from paceline.errors import ConfigError


class KernelCodec(Codec):
    """A codec with a kernel in csrc/core/codecs and a reference in PyTorch."""

    _checksum = False
    _use_reference = False

    def set_options(self, *, checksum: bool = False, use_reference: bool = False) -> None:
        self._checksum, self._use_reference = checksum, use_reference

    @abc.abstractmethod
    def arguments(self, x: torch.Tensor, state: dict[str, Any]) -> dict[str, Any]:
        """Return the kernel's arguments besides tensors: parameter, tau, entropy, stochastic, key."""

    @abc.abstractmethod
    def reference_encode(
        self, x: torch.Tensor, residual: torch.Tensor | None, arguments: dict[str, Any]
    ) -> tuple[PayloadHeader, bytes]:
        """Return header and body for flat float32 x; updates the residual."""

    def max_encoded_bytes(self, numel: int) -> int:
        max_bytes = payload.max_bytes if core.module is None else core.module.codec_max_bytes
        return int(max_bytes(self.name, numel, self.parameter(numel)))

    def parameter(self, numel: int) -> int:
        """Return what decides the payload's size: block length, or number of elements sent."""
        return 0

    def encode(
        self, x: torch.Tensor, state: dict[str, Any], *, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self.encode_with_residual(x, None, state, out=out)

    def encode_with_residual(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        state: dict[str, Any],
        *,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        started = time.perf_counter()
        flat, source = flat_float32(x, self.name)
        if residual is not None:
            check_residual(residual, flat, self.name)
        arguments = self.arguments(flat, state)
        not_finite = 0
        if self._use_reference or core.module is None:
            plain, body = self.reference_encode(flat, residual, arguments)
            header = dataclasses.replace(plain, source=source, has_checksum=self._checksum)
            encoded = payload.as_tensor(payload.join(header, body), torch.uint8).to(flat.device)
            if out is not None:
                encoded = out[: encoded.numel()].copy_(encoded)
        elif flat.device.type != "cpu":
            encoded, header, not_finite = self._run_elsewhere(flat, residual, arguments, source, out)
        else:
            encoded, not_finite = self._run_kernel(flat, residual, arguments, source, out)
            header = _own_header(encoded)
        counts = ledger.record(state, header, encoded.numel())
        counts["not_finite"] += not_finite
        counts["extra_memory_bytes"] = 0 if residual is None else 4 * residual.numel()
        self.encoded(header, state)
        counts["encode_s"] += time.perf_counter() - started
        return encoded

    def _run_elsewhere(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        arguments: dict[str, Any],
        source: int,
        out: torch.Tensor | None,
    ) -> tuple[torch.Tensor, PayloadHeader, int]:
        """On the device where there is a kernel for it, else on the CPU."""
        if device.can_encode(self.name, x.device, arguments):
            capacity = self.max_encoded_bytes(x.numel())
            settings: dict[str, Any] = {"source": source, "has_checksum": self._checksum, "out": out}
            return device.encode(self.name, x, residual, arguments, capacity=capacity, **settings)
        own = None if residual is None else residual.cpu()
        encoded, not_finite = self._run_kernel(x.cpu(), own, arguments, source, None)
        if residual is not None and own is not None:
            residual.copy_(own)
        header = _own_header(encoded)
        encoded = encoded.to(x.device) if out is None else out[: encoded.numel()].copy_(encoded)
        return encoded, header, not_finite

    def _run_kernel(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        arguments: dict[str, Any],
        source: int,
        out: torch.Tensor | None,
    ) -> tuple[torch.Tensor, int]:
        """Return the payload, and the number of elements left out because they are not finite."""
        if out is None:
            out = torch.empty(self.max_encoded_bytes(x.numel()), dtype=torch.uint8)
        elif out.dtype != torch.uint8 or not out.is_contiguous() or out.device.type != "cpu":
            raise ConfigError(
                f"{self.name}: out must be a contiguous uint8 tensor on the CPU, got {out.dtype}"
            )
        assert core.module is not None, "the reference stands in for a core that is missing"
        num_bytes, not_finite = core.module.codec_encode(
            self.name,
            x.data_ptr(),
            0 if residual is None else residual.data_ptr(),
            x.numel(),
            out.data_ptr(),
            out.numel(),
            source=source,
            checksum=self._checksum,
            **arguments,
        )
        return out[:num_bytes], not_finite

    def encoded(self, header: PayloadHeader, state: dict[str, Any]) -> None:
        """Called after every encode; adaptive codecs adjust themselves here."""

    def decode(self, payload: torch.Tensor, out: torch.Tensor, *, accumulate: bool = False) -> None:
        decode_any(payload, out, accumulate=accumulate, codec=self.name, use_reference=self._use_reference)


def flat_float32(x: torch.Tensor, who: str) -> tuple[torch.Tensor, int]:
    """Return x as contiguous 1-D float32, and the header's number for its dtype. Raises ConfigError."""
    if x.dtype not in payload.SOURCES:
        raise ConfigError(f"{who}: a float32, float16, bfloat16 or float64 tensor expected, got {x.dtype}")
    if x.numel() > payload.MAX_NUMEL:
        raise ConfigError(f"{who}: at most 2^31 - 1 elements per tensor, got {x.numel()}; use buckets")
    return x.detach().reshape(-1).to(torch.float32).contiguous(), payload.SOURCES[x.dtype]


def check_residual(residual: torch.Tensor, x: torch.Tensor, who: str) -> None:
    """Raise ConfigError unless `residual` is contiguous float32 of the size of `x`."""
    if residual.dtype != torch.float32 or not residual.is_contiguous() or residual.numel() != x.numel():
        raise ConfigError(
            f"{who}: the residual in the state has {residual.numel()} elements of {residual.dtype}, the "
            f"tensor has {x.numel()}: one state belongs to one tensor; use another state, or clear it"
        )


def _own_header(encoded: torch.Tensor) -> PayloadHeader:
    """Read the header of our own payload without walking over its body for the checksum."""
    head = bytearray(encoded[: payload.HEADER_BYTES].numpy().tobytes())
    head[7] &= 0xFE
    head[28:32] = bytes(4)
    return payload.read(bytes(head))
