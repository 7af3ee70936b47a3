"""What a check says."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

OK, NOTE, WARNING, PROBLEM = "ok", "note", "warning", "problem"
_ORDER = (OK, NOTE, WARNING, PROBLEM)


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was looked at."""

    check: str
    """What kind of thing: "cores", "shared memory", …"""
    status: str
    """"ok", "note", "warning" (training works, but badly) or "problem" (it will not work)."""
    message: str
    """What is the case, in one sentence."""
    fix: str = ""
    """What to do, for warnings and problems."""
    where: str = ""
    """The host, or "a -> b" for two."""
    values: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The figures behind the sentence; units are in the names."""

    def at(self, where: str) -> Finding:
        """The same finding with its place."""
        return dataclasses.replace(self, where=where)

    def to_json(self) -> dict[str, Any]:
        """Plain values."""
        return dataclasses.asdict(self)


def worst(findings: Iterable[Finding]) -> str:
    """The worst status among them; "ok" for none."""
    return max((f.status for f in findings), key=_ORDER.index, default=OK)


def exit_code(findings: Iterable[Finding]) -> int:
    """1 if there is a problem, else 0."""
    return int(worst(findings) == PROBLEM)
