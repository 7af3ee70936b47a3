"""Fewer bytes for a tensor, one file per codec.

`make("error_feedback(codec=onebit)")` gives a Codec; `make_reducer(...)` what sums one tensor over all ranks
with it. Payloads describe themselves, so `decode(payload, out)` needs no codec. Importing this package does
not import torch; making something does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from paceline import registry, spec
from paceline.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from paceline.codecs.kernel.codec import Codec
    from paceline.codecs.reducers.reducer import Reducer


def make(codec: str | spec.Spec | Codec, *, checksum: bool = False, use_reference: bool = False) -> Codec:
    """Make the codec that a spec string such as `threshold(tau=0.01, entropy=true)` names.

    `checksum` adds a CRC-32C to every payload; `use_reference` runs the readable PyTorch version instead of
    the C++ kernels (same bytes, slower). Raises ConfigError for an unknown name or argument.
    """
    from paceline.codecs.kernel.codec import Codec

    if isinstance(codec, Codec):
        return codec
    parsed = _parsed(codec)
    made = _instance(parsed)
    if not isinstance(made, Codec):
        raise ConfigError(
            f"{parsed} is not a codec for single tensors but a way to reduce one over all ranks: "
            f"give it to a strategy or to ddp_hook, e.g. all_reduce(codec={parsed})"
        )
    made.set_options(checksum=checksum, use_reference=use_reference)
    return made


def make_reducer(codec: str | spec.Spec | Codec | Reducer, *, checksum: bool = False) -> Reducer:
    """Make what sums one flat tensor over all ranks with this codec, each in the form that suits it."""
    from paceline.codecs.kernel.codec import Codec
    from paceline.codecs.reducers.reducer import Reducer, reducer_for

    if isinstance(codec, Reducer):
        return codec
    if isinstance(codec, str | spec.Spec):
        made = _instance(_parsed(codec))
        if isinstance(made, Reducer):
            return made
        assert isinstance(made, Codec)
        made.set_options(checksum=checksum)
        codec = made
    return reducer_for(codec)


def decode(payload: torch.Tensor, out: torch.Tensor, *, accumulate: bool = False) -> None:
    """Decode a payload of any codec into `out` (same number of elements), or add it to `out`.

    Raises ProtocolError, leaving `out` untouched, when the bytes are not a valid payload for it.
    """
    from paceline.codecs.kernel.codec import decode_any

    decode_any(payload, out, accumulate=accumulate)


def _parsed(codec: str | spec.Spec) -> spec.Spec:
    if isinstance(codec, str):
        return spec.parse(codec)
    if isinstance(codec, spec.Spec):
        return codec
    raise ConfigError(f"codec: a name such as int8 or threshold(tau=0.01) expected, got {codec!r}")


def _instance(parsed: spec.Spec) -> Any:
    from paceline.codecs.kernel.codec import Codec
    from paceline.codecs.reducers.reducer import Reducer

    module = registry.load(__name__, parsed.name, kind="codec")
    base: type = Reducer if parsed.name in _REDUCERS else Codec
    return spec.call(registry.find_class(module, base), parsed, kind="codec")


# Methods that need shapes and collectives of their own.
_REDUCERS = {"powersgd"}
