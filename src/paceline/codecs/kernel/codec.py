"""The base of all codecs, and the decoding of any payload."""

from __future__ import annotations

import abc
from typing import Any

import torch

from paceline import core, registry
from paceline.codecs.kernel import charged, device, ledger, payload
from paceline.errors import ConfigError


class Codec(abc.ABC):
    """Fewer bytes for one flat tensor: the seam between codecs and what sends tensors.

    A new codec is a file in `paceline/codecs` with one concrete subclass. Its constructor's keyword arguments
    are those of the spec string, and the class docstring describes each of them.

    The `state` given to its methods is a dict of tensors and plain values, one per tensor that is encoded
    again and again (a bucket); it is empty at first, belongs to the codec, and belongs in the checkpoint.
    Encoding and decoding take virtual time in simulations that charge it (`charged`).
    """

    def __init_subclass__(cls, **options: Any) -> None:
        super().__init_subclass__(**options)
        charged.wrap(cls)

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
        """Encode one tensor.

        Args:
            x: Floating-point tensor of any shape, at most 2^31 - 1 elements; not changed.
            state: What is kept for this tensor, see the class.
            out: 1-D uint8 tensor of `max_encoded_bytes(x.numel())` to write the payload into; default a new
                one.

        Returns the payload: 1-D uint8, a slice of `out` when that is given.

        Raises:
            ConfigError: A tensor of another dtype, or a state that belongs to a tensor of another size.
        """

    @abc.abstractmethod
    def encode_with_residual(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        state: dict[str, Any],
        *,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Encode x + residual; afterwards `residual` holds what was not sent.

        `residual` is contiguous float32 with as many elements as `x`; None means zero, and what is not sent
        is lost. Other arguments, result and errors as for `encode`.
        """

    @abc.abstractmethod
    def decode(self, payload: torch.Tensor, out: torch.Tensor, *, accumulate: bool = False) -> None:
        """Decode a payload into `out`, or add it to `out` with `accumulate`.

        `out` is a floating-point tensor with as many elements as were encoded. Raises ProtocolError, leaving
        `out` untouched, when the bytes are not a valid payload of this codec for it.
        """

    @abc.abstractmethod
    def set_options(self, *, checksum: bool = False, use_reference: bool = False) -> None:
        """Set whether payloads carry a CRC-32C, and whether the PyTorch reference runs instead of C++."""

    def stats(self, state: dict[str, Any]) -> dict[str, float]:
        """Bytes by cause, bits per hit, encode time and extra memory since `state` was new."""
        return ledger.stats(state)

    @classmethod
    def reference_decode(cls, header: payload.PayloadHeader, body: bytes) -> torch.Tensor:
        """Return the float32 values of a body, in PyTorch; ProtocolError for one that is not valid."""
        raise NotImplementedError(f"{cls.__name__} has no payload of its own")


def decode_any(
    encoded: torch.Tensor,
    out: torch.Tensor,
    *,
    accumulate: bool = False,
    codec: str | None = None,
    use_reference: bool = False,
) -> None:
    """Decode a payload of `codec` (None: of the codec that it names) into `out`, or add it to `out`."""
    if encoded.dtype != torch.uint8:
        raise ConfigError(f"decode: a payload is a uint8 tensor, got {encoded.dtype}")
    if not out.is_floating_point():
        raise ConfigError(f"decode: out must be a floating tensor, got {out.dtype}")
    encoded = encoded.detach().contiguous()
    if not use_reference and (out.device.type != "cpu" or encoded.device.type != "cpu"):
        _decode_elsewhere(encoded, out, accumulate=accumulate, codec=codec)
        return
    kernels = None if use_reference else core.module
    if kernels is not None and out.dtype == torch.float32 and out.is_contiguous():
        kernels.codec_decode(
            codec or "any", encoded.data_ptr(), encoded.numel(), out.data_ptr(), out.numel(), accumulate
        )
        return
    if kernels is not None:
        values = torch.empty(out.numel(), dtype=torch.float32)
        decode_any(encoded, values, codec=codec)
    else:
        header, body = payload.split(payload.as_bytes(encoded), codec=codec, numel=out.numel())
        module = registry.load("paceline.codecs", header.codec, kind="codec")
        decoder = registry.find_class(module, Codec)  # type: ignore[type-abstract]
        values = decoder.reference_decode(header, body).to(out.device)
    _put(values, out, accumulate=accumulate)


def _decode_elsewhere(
    encoded: torch.Tensor, out: torch.Tensor, *, accumulate: bool, codec: str | None
) -> None:
    """On the device where there is a kernel for it, else on the CPU."""
    if device.has_kernels(out.device):
        header = device.read_header(encoded)
        payload.check_fits(header, codec=codec, numel=out.numel())
        if device.can_decode(header, out.device):
            is_plain = out.dtype == torch.float32 and out.is_contiguous()
            values = out.detach().view(-1) if is_plain else torch.empty(out.numel(), device=out.device)
            device.decode(encoded, header, values, accumulate=accumulate and is_plain)
            if not is_plain:
                _put(values, out, accumulate=accumulate)
            return
    values = torch.empty(out.numel(), dtype=torch.float32)
    decode_any(encoded.cpu(), values, codec=codec)
    _put(values.to(out.device), out, accumulate=accumulate)


def _put(values: torch.Tensor, out: torch.Tensor, *, accumulate: bool) -> None:
    values = values.view(out.shape)
    with torch.no_grad():
        if accumulate:
            out.add_(values)
        else:
            out.copy_(values)
