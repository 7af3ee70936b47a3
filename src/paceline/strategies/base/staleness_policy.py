"""What a staleness policy may decide, and how several are joined."""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any, ClassVar

import torch

from paceline import registry, spec
from paceline.errors import ConfigError
from paceline.spec import Spec

PACKAGE = "paceline.strategies.staleness"


class StalenessPolicy(abc.ABC):
    """Decisions of a shard about an update of staleness s (shard clock now − shard clock at its pull).

    A policy overrides what it is about; everything else means "no opinion". One instance serves one shard.
    """

    advice: ClassVar[str]
    """One line: when to choose it."""
    group: int = 1
    """Updates that are collected, then applied at once as their mean (one tick of the shard's clock)."""
    gap: int | None = None
    """A worker may read only if its clock is at most this far ahead of the slowest live worker's."""
    waits: bool = False
    """Whether a worker's read waits until its own last update was applied or dropped."""

    def scale(self, staleness: int) -> float:
        """Factor on the update."""
        return 1.0

    def accepts(self, staleness: int) -> bool:
        """Whether the update is used at all; dropped ones are counted."""
        return True

    def transform(self, index: int, update: torch.Tensor) -> None:  # noqa: B027
        """Change piece `index` of an update in place, before it is scaled."""

    def state_dict(self) -> dict[str, Any]:
        """What a continued run needs: tensors and plain values."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027  most policies keep nothing
        """Continue from `state_dict()`."""


class Joined(StalenessPolicy):
    """Several policies at once: factors multiply, all must accept, the tightest gap holds."""

    advice = "Joined policies."

    def __init__(self, parts: Sequence[StalenessPolicy]) -> None:
        groups = [p.group for p in parts if p.group > 1]
        if len(groups) > 1:
            raise ConfigError("at most one of the joined staleness policies may collect updates in groups")
        gaps = [p.gap for p in parts if p.gap is not None]
        self.parts = list(parts)
        self.group = groups[0] if groups else 1
        self.gap = min(gaps) if gaps else None
        self.waits = any(p.waits for p in parts)

    def scale(self, staleness: int) -> float:
        """Product of all factors."""
        product = 1.0
        for part in self.parts:
            product *= part.scale(staleness)
        return product

    def accepts(self, staleness: int) -> bool:
        """Whether all accept."""
        return all(part.accepts(staleness) for part in self.parts)

    def transform(self, index: int, update: torch.Tensor) -> None:
        """All, in the order written."""
        for part in self.parts:
            part.transform(index, update)

    def state_dict(self) -> dict[str, Any]:
        """All parts'."""
        return {str(i): part.state_dict() for i, part in enumerate(self.parts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Give all parts theirs."""
        for i, part in enumerate(self.parts):
            part.load_state_dict(state[str(i)])


def make(given: str | Spec | tuple[Spec, ...]) -> Joined:
    """`softsync(c=4)+inverse` → a fresh policy. Raises ConfigError."""
    terms: Any = spec.parse_sum(given) if isinstance(given, str) else given
    if isinstance(terms, Spec):
        terms = (terms,)
    if not isinstance(terms, tuple) or not all(isinstance(t, Spec) for t in terms):
        raise ConfigError(f"staleness={given!r}: a policy such as inverse or softsync(c=4)+inverse expected")
    parts = []
    for term in terms:
        parts.append(spec.call(class_of(term.name), term, kind="staleness policy"))
    return Joined(parts)


def class_of(name: str) -> type[StalenessPolicy]:
    """The policy called `name`. Raises ConfigError."""
    return registry.find_class(registry.load(PACKAGE, name, kind="staleness policy"), StalenessPolicy)


def whole(name: str, value: Any, *, least: int) -> int:
    """Return `value` if it is a whole number of at least `least`, else raise ConfigError."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{name}={value!r}: a whole number >= {least} expected")
    return value
