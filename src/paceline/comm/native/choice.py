"""What decides an algorithm: one choice with its reason, and tables of choices that were measured."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping

from paceline import registry
from paceline.errors import ConfigError

OPERATIONS = ("all_reduce", "reduce_scatter", "all_gather", "broadcast", "reduce")
"""The operations that have several algorithms between hosts."""
KNOWN = (*OPERATIONS, "gather", "scatter", "all_to_all", "barrier")
DIRECT = "direct"
"""The core's own algorithm between hosts: all ranks talk to each other."""
_VERSION = 3  # counts up when what is measured or what is in a table changes


@dataclasses.dataclass(frozen=True)
class Choice:
    """What one operation gets at one size, and why."""

    operation: str
    num_bytes: int
    algorithm: str
    reason: str
    runner_up: str | None = None
    times_s: Mapping[str, float] = dataclasses.field(default_factory=dict)
    """Seconds by algorithm, as measured or simulated; fastest first."""

    def __str__(self) -> str:
        after = f"; runner-up: {self.runner_up}" if self.runner_up else ""
        return f"{self.operation} of {self.num_bytes} bytes: {self.algorithm}: {self.reason}{after}"


@dataclasses.dataclass(frozen=True)
class ChoiceTable:
    """Choices by operation and size. Between two sizes that of the nearer one (by ratio) holds."""

    choices: tuple[Choice, ...] = ()
    source: str = ""
    """"measured", or the file that it was read from."""

    def find(self, operation: str, num_bytes: int) -> Choice | None:
        """Return the choice that holds; None if the operation is not in the table."""
        rows = [c for c in self.choices if c.operation == operation]
        return min(rows, key=lambda c: _ratio(c.num_bytes, num_bytes)) if rows else None

    def to_json(self) -> str:
        """Plain JSON, `from_json`'s inverse."""
        return json.dumps({"version": _VERSION, "choices": [dataclasses.asdict(c) for c in self.choices]})

    @classmethod
    def from_json(cls, text: str, source: str) -> ChoiceTable:
        """Raises ValueError, KeyError or TypeError for anything else than a table."""
        value = json.loads(text)
        if value["version"] != _VERSION:
            raise ValueError(f"version {value['version']}")
        return cls(tuple(Choice(**c) for c in value["choices"]), source)


def check_operation(operation: str) -> None:
    """ConfigError for a name that is no collective."""
    if operation not in KNOWN:
        raise ConfigError(registry.unknown("operation", operation, KNOWN))


def _ratio(a: int, b: int) -> float:
    return max(a, 1) / max(b, 1) if a > b else max(b, 1) / max(a, 1)
