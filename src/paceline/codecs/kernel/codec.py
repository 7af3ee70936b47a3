"""The base of all codecs, and decoding of any payload."""

from __future__ import annotations

import abc
from typing import Any

import torch

from paceline import _core, registry
from paceline.codecs.kernel import ledger, payload
from paceline.errors import ConfigError


class Codec(abc.ABC):
    """Fewer bytes for one flat tensor.

    `state` is a dict of tensors and plain values, one per tensor that is encoded again and again (a bucket);
    it is empty at first, belongs to the codec, and belongs in the checkpoint.
    """

    is_unbiased: bool = False
    """Whether the decoded value's expectation is the input."""
    is_sparse: bool = False
    """Whether the payload's size depends on the values; if so peers exchange whole payloads."""
    keeps_residual: bool = False
    """Whether the method itself keeps in `state` what it did not send."""

    @property
    def name(self) -> str:
        """The file's name, which is the name in spec strings."""
        return type(self).__module__.rpartition(".")[2]

    @abc.abstractmethod
    def max_encoded_bytes(self, numel: int) -> int:
        """Bytes that `encode` needs at most; for codecs that are not sparse, exactly."""

    @abc.abstractmethod
    def encode(
        self, x: torch.Tensor, state: dict[str, Any], *, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Payload (1-D uint8) of a floating tensor; a slice of `out` (max_encoded_bytes) when given."""

    @abc.abstractmethod
    def encode_with_residual(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        state: dict[str, Any],
        *,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Payload of x + residual; afterwards `residual` (float32; None: 0) holds what was not sent."""

    @abc.abstractmethod
    def decode(self, payload: torch.Tensor, out: torch.Tensor, *, accumulate: bool = False) -> None:
        """Decode into `out`, or add to it. ProtocolError leaves `out` untouched."""

    @abc.abstractmethod
    def set_options(self, *, checksum: bool = False, use_reference: bool = False) -> None:
        """Whether payloads carry a CRC-32C, and whether the PyTorch reference runs instead of C++."""

    def stats(self, state: dict[str, Any]) -> dict[str, float]:
        """Bytes by cause, bits per hit, encode time and extra memory since `state` was new."""
        return ledger.stats(state)

    @classmethod
    def reference_decode(cls, header: payload.PayloadHeader, body: bytes) -> torch.Tensor:
        """Float32 values of a body, the readable way; ProtocolError for one that is not valid."""
        raise NotImplementedError(f"{cls.__name__} has no payload of its own")


def decode_any(
    encoded: torch.Tensor,
    out: torch.Tensor,
    *,
    accumulate: bool = False,
    codec: str | None = None,
    use_reference: bool = False,
) -> None:
    """Decode a payload of `codec` (None: whichever it names) into `out`, or add it to `out`."""
    if encoded.dtype != torch.uint8:
        raise ConfigError(f"decode: a payload is a uint8 tensor, got {encoded.dtype}")
    if not out.is_floating_point():
        raise ConfigError(f"decode: out must be a floating tensor, got {out.dtype}")
    encoded = encoded.detach().contiguous()
    is_native = not use_reference and out.device.type == "cpu" and encoded.device.type == "cpu"
    if is_native and out.dtype == torch.float32 and out.is_contiguous():
        name = codec or "any"
        pointers = encoded.data_ptr(), encoded.numel(), out.data_ptr(), out.numel()
        _core.codec_decode(name, *pointers, accumulate)
        return
    if is_native:
        values = torch.empty(out.numel(), dtype=torch.float32)
        decode_any(encoded, values, codec=codec)
    else:
        header, body = payload.split(payload.as_bytes(encoded), codec=codec, numel=out.numel())
        base: Any = Codec
        module = registry.load("paceline.codecs", header.codec, kind="codec")
        values = registry.find_class(module, base).reference_decode(header, body).to(out.device)
    values = values.view(out.shape)
    with torch.no_grad():
        if accumulate:
            out.add_(values)
        else:
            out.copy_(values)
