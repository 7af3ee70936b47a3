"""Encoding and decoding as local work: every codec's methods are wrapped when its class is defined.

So a simulation charges the codecs of plug-ins too, and callers need not think of it. A codec
inside another is a part of it.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch

from paceline import local_work
from paceline.local_work import Rehearsal, WorkKind

# Functions with the signatures of the methods that they replace, which differ.
Method = Callable[..., Any]
Account = Callable[..., tuple[WorkKind, str, int, Rehearsal]]
"""What a method is charged as, from the method and the arguments of its call."""


def wrap(cls: type) -> None:
    """Let the methods that `cls` itself defines charge what they do."""
    accounts: dict[str, Account] = {
        "encode": _encode,
        "encode_with_residual": _encode_with_residual,
        "decode": _decode,
    }
    for name, account in accounts.items():
        method = vars(cls).get(name)
        if method is not None and not getattr(method, "__isabstractmethod__", False):
            setattr(cls, name, _charging(method, account))


def _charging(method: Method, account: Account) -> Method:
    @functools.wraps(method)
    def charging(*args: Any, **options: Any) -> Any:
        if not local_work.is_heard():
            return method(*args, **options)
        with local_work.unheard():
            result = method(*args, **options)
        local_work.charge(*account(method, *args, **options))
        return result

    return charging


def describe(codec: object) -> str:
    """A codec's name and arguments, without those that are off: equal for equal codecs."""
    given = {k: v for k, v in sorted(vars(codec).items()) if v is not None and v is not False}
    arguments = ", ".join(f"{k.lstrip('_')}={_plain(v)}" for k, v in given.items())
    name = getattr(codec, "name", "") or type(codec).__name__
    return f"{name}({arguments})" if arguments else name


def _plain(value: object) -> str:
    return str(value) if isinstance(value, str | int | float | None) else describe(value)


def _encode(
    method: Method, self: Any, x: torch.Tensor, state: dict[str, Any], **_: Any
) -> tuple[WorkKind, str, int, Rehearsal]:
    def rehearsal() -> Callable[[], object]:
        return functools.partial(method, self, x, copy.deepcopy(state))

    return WorkKind.ENCODE, describe(self), x.numel(), rehearsal


def _encode_with_residual(
    method: Method, self: Any, x: torch.Tensor, residual: torch.Tensor | None, state: dict[str, Any], **_: Any
) -> tuple[WorkKind, str, int, Rehearsal]:
    def rehearsal() -> Callable[[], object]:
        own = None if residual is None else residual.clone()
        return functools.partial(method, self, x, own, copy.deepcopy(state))

    kept = "" if residual is None else ", residual"
    return WorkKind.ENCODE, describe(self) + kept, x.numel(), rehearsal


def _decode(
    method: Method, self: Any, payload: torch.Tensor, out: torch.Tensor, **options: Any
) -> tuple[WorkKind, str, int, Rehearsal]:
    def rehearsal() -> Callable[[], object]:
        return functools.partial(method, self, payload, out.clone(), **options)

    how = ", added" if options.get("accumulate") else ""
    if getattr(self, "is_sparse", False):  # the more hits, the longer it takes: by powers of two
        how += f", below {1 << payload.numel().bit_length()} bytes"
    return WorkKind.DECODE, describe(self) + how, out.numel(), rehearsal
