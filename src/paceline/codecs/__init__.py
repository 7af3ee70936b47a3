"""Fewer bytes for a tensor, one file per codec.

`make("error_feedback(codec=onebit)")` gives a Codec; `make_reducer(...)` what sums one tensor over all ranks
with it. Payloads describe themselves, so `decode(payload, out)` needs no codec. Importing this package does
not import torch; making something does.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING

from paceline import registry, spec
from paceline.errors import ConfigError

if TYPE_CHECKING:
    import torch

    from paceline.codecs.kernel.codec import Codec
    from paceline.codecs.reducers.reducer import Reducer


def make(codec: str | spec.Spec | Codec, *, checksum: bool = False, use_reference: bool = False) -> Codec:
    """Make the codec that a spec string names.

    Args:
        codec: A spec string such as `threshold(tau=0.01, entropy=true)`, or a codec, which is returned as it
            is.
        checksum: Add a CRC-32C to every payload, for links that are not trusted to deliver what was sent;
            default false.
        use_reference: Run the readable PyTorch version instead of the C++ kernels: the same bytes, slower.

    Raises:
        ConfigError: An unknown name or argument, or a reducer such as `powersgd`, which cannot encode a
            single tensor.

    Example:
        `codecs.make("int8").encode(gradient, state)`
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
    """Make what sums one flat tensor over all ranks with a codec.

    Args:
        codec: A spec string such as `powersgd(rank=2)` or `int8`, a codec, or a reducer, which is returned as
            it is.
        checksum: Add a CRC-32C to every payload; for spec strings of codecs.

    Codecs with a known payload size are summed in two stages; those whose payload size depends on the values
    send all payloads to all ranks; `powersgd` has a way of its own.

    Raises:
        ConfigError: An unknown name or argument.
    """
    from paceline.codecs.kernel.codec import Codec
    from paceline.codecs.reducers.all_payloads import AllPayloads
    from paceline.codecs.reducers.reducer import Reducer
    from paceline.codecs.reducers.two_stage import TwoStage

    if isinstance(codec, Reducer):
        return codec
    if not isinstance(codec, Codec):
        made = _instance(_parsed(codec))
        if isinstance(made, Reducer):
            return made
        made.set_options(checksum=checksum)
        codec = made
    return AllPayloads(codec) if codec.is_sparse else TwoStage(codec)


def decode(payload: torch.Tensor, out: torch.Tensor, *, accumulate: bool = False) -> None:
    """Decode a payload of any codec.

    Args:
        payload: 1-D uint8 tensor, as `encode` returned it.
        out: Floating-point tensor with as many elements as were encoded; overwritten.
        accumulate: Add to `out` instead; default false.

    Raises:
        ProtocolError: The bytes are not a valid payload for `out`, which is left untouched.
        ConfigError: A tensor of another dtype.
    """
    from paceline.codecs.kernel.codec import decode_any

    decode_any(payload, out, accumulate=accumulate)


def _parsed(codec: str | spec.Spec) -> spec.Spec:
    if isinstance(codec, str):
        return spec.parse(codec)
    if isinstance(codec, spec.Spec):
        return codec
    raise ConfigError(f"codec: a name such as int8 or threshold(tau=0.01) expected, got {codec!r}")


def _instance(parsed: spec.Spec) -> Codec | Reducer:
    """Make what a plug-in file defines: a codec, or a reducer with collectives of its own."""
    from paceline.codecs.kernel.codec import Codec
    from paceline.codecs.reducers.reducer import Reducer

    module = registry.load(__name__, parsed.name, kind="codec")
    own = [c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__]
    base = Reducer if any(issubclass(c, Reducer) for c in own) else Codec
    made: Codec | Reducer = spec.call(registry.find_class(module, base), parsed, kind="codec")
    return made
