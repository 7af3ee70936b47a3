"""What a staleness policy of the parameter server decides, and how several are joined."""

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
    """Decisions of a shard about an update of staleness s.

    s is the shard's clock now minus its clock when the worker pulled the weights that the update was computed
    from. A policy overrides what it decides; the defaults change nothing. One instance serves one shard, and
    runs inside its message handlers.
    """

    advice: ClassVar[str]
    """One line for `paceline strategies`: when to choose this policy."""
    group: int = 1
    """Number of updates that are collected and applied as their mean, in one tick of the shard's clock."""
    gap: int | None = None
    """A worker may read only if its clock is at most this far ahead of that of the slowest other worker."""
    waits: bool = False
    """Whether a worker's read waits until its own last update was applied or dropped."""

    def scale(self, staleness: int) -> float:
        """Factor on an update of this staleness."""
        return 1.0

    def accepts(self, staleness: int) -> bool:
        """Whether an update of this staleness is used at all; dropped ones are counted."""
        return True

    def transform(self, index: int, update: torch.Tensor) -> None:  # noqa: B027
        """Change piece `index` of an update (1-D, one per flat buffer) in place, before it is scaled."""

    def describe(self) -> str:
        """Its name: what decides how long `transform` takes."""
        return type(self).__module__.rpartition(".")[2]

    def state_dict(self) -> dict[str, Any]:
        """What a continued run needs: tensors and plain values only."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027  most policies keep nothing
        """Continue from what `state_dict()` returned."""


class JoinedPolicy(StalenessPolicy):
    """Several policies at once: factors multiply, all must accept, the smallest gap holds.

    Args:
        parts: The policies, in the order in which they transform an update.

    Raises:
        ConfigError: More than one of them collects updates in groups.
    """

    advice = "Joined policies."

    def __init__(self, parts: Sequence[StalenessPolicy]) -> None:
        groups = [part.group for part in parts if part.group > 1]
        if len(groups) > 1:
            raise ConfigError("at most one of the joined staleness policies may collect updates in groups")
        gaps = [part.gap for part in parts if part.gap is not None]
        self.parts = list(parts)
        self.group = groups[0] if groups else 1
        self.gap = min(gaps) if gaps else None
        self.waits = any(part.waits for part in parts)

    def scale(self, staleness: int) -> float:
        product = 1.0
        for part in self.parts:
            product *= part.scale(staleness)
        return product

    def accepts(self, staleness: int) -> bool:
        return all(part.accepts(staleness) for part in self.parts)

    def transform(self, index: int, update: torch.Tensor) -> None:
        for part in self.parts:
            part.transform(index, update)

    def describe(self) -> str:
        return "+".join(part.describe() for part in self.parts)

    def state_dict(self) -> dict[str, Any]:
        return {str(i): part.state_dict() for i, part in enumerate(self.parts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for i, part in enumerate(self.parts):
            part.load_state_dict(state[str(i)])


def make(given: str | Spec | tuple[Spec, ...]) -> JoinedPolicy:
    """Make the policy that `softsync(c=4)+inverse` names, with a state of its own. Raises ConfigError."""
    terms: object = spec.parse_sum(given) if isinstance(given, str) else given
    if isinstance(terms, Spec):
        terms = (terms,)
    if not isinstance(terms, tuple) or not all(isinstance(term, Spec) for term in terms):
        raise ConfigError(f"staleness={given!r}: a policy such as inverse or softsync(c=4)+inverse expected")
    return JoinedPolicy([spec.call(class_of(term.name), term, kind="staleness policy") for term in terms])


def class_of(name: str) -> type[StalenessPolicy]:
    """Return the class of the policy called `name`. Raises ConfigError."""
    return registry.find_class(registry.load(PACKAGE, name, kind="staleness policy"), StalenessPolicy)
