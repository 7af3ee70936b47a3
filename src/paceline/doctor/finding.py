"""What a check finds."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

OK, NOTE, WARNING, PROBLEM = "ok", "note", "warning", "problem"
_ORDER = (OK, NOTE, WARNING, PROBLEM)


@dataclasses.dataclass(frozen=True)
class Finding:
    """The result of one check."""

    check: str
    """Which check: "cores", "shared memory", …"""
    status: str
    """"ok", "note", "warning" (training works, but badly) or "problem" (it will not work)."""
    message: str
    """What was found, in one sentence."""
    fix: str = ""
    """What to do about a warning or a problem."""
    where: str = ""
    """The host, or "a -> b" for the link between two."""
    values: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The figures behind the message, with units in their names."""

    def at(self, where: str) -> Finding:
        """The same finding, with its host or link."""
        return dataclasses.replace(self, where=where)

    def to_json(self) -> dict[str, Any]:
        """The finding as a JSON object."""
        return dataclasses.asdict(self)


def worst(findings: Iterable[Finding]) -> str:
    """The worst status of all; "ok" if there are no findings."""
    return max((f.status for f in findings), key=_ORDER.index, default=OK)


def exit_code(findings: Iterable[Finding]) -> int:
    """The exit code of `paceline doctor`: 1 if there is a problem, else 0."""
    return int(worst(findings) == PROBLEM)
