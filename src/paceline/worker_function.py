"""How a user's function is called on each worker: `fn(*args)`, or `fn(rank, *args)` if that is what fits."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence

from paceline.errors import ConfigError


def takes_rank(fn: Callable[..., object], args: Sequence[object], *, caller: str) -> bool:
    """Whether to call `fn(rank, *args)`, because `fn(*args)` does not fit.

    Args:
        fn: The user's function.
        args: Its arguments, without the rank.
        caller: Name of the public function that was given `fn`, for errors.

    Raises:
        ConfigError: `fn` is not callable, or neither call fits.
    """
    if not callable(fn):
        raise ConfigError(f"{caller}(): a function expected, got {type(fn).__name__}")
    try:
        signature = inspect.signature(fn)
    except (ValueError, TypeError):  # a built-in function without a signature
        return False
    for arguments, passes_rank in ((tuple(args), False), ((0, *args), True)):
        try:
            signature.bind(*arguments)
        except TypeError:
            continue
        return passes_rank
    raise ConfigError(
        f"{caller}({name_of(fn)}): it takes {signature}, and args has {len(args)} values; "
        "it is called as fn(*args), or as fn(rank, *args) if it takes one more"
    )


def name_of(fn: Callable[..., object]) -> str:
    """The name of `fn`, for errors."""
    return str(getattr(fn, "__qualname__", fn))
