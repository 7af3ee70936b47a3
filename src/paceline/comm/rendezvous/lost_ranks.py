"""What rank 0 and the launcher tell each other about ranks that are gone, through the launcher's store.

The launcher sees processes end; rank 0 sees that a rank no longer answers, or that it left in the middle of
the work. Each tells the other what it cannot see by itself.
"""

from __future__ import annotations

import json
from typing import Any

from torch._C._distributed_c10d import Store

from paceline.types import Rank

_ENDED, _LOST, _DEADLINE, _TOLERATED = "gone/ended", "gone/lost", "gone/deadline", "gone/tolerated"


class LostRanks:
    """The two lists, the deadline of the job, and whether the ranks can do without one.

    Args:
        store: The launcher's store, for one attempt of the job.
    """

    def __init__(self, store: Store) -> None:
        self._store: Any = store  # torch's declarations leave out `append`

    def add_ended(self, rank: Rank) -> None:
        """The launcher: the process of `rank` has ended, and the job continues without it."""
        self._add(_ENDED, rank, "its process has ended")

    def add_lost(self, rank: Rank, why: str) -> None:
        """Rank 0: `rank` does not answer, or has left in the middle of the work."""
        self._add(_LOST, rank, why)

    def ended(self) -> dict[Rank, str]:
        """The ranks that the launcher has named, and why."""
        return self._members(_ENDED)

    def lost(self) -> dict[Rank, str]:
        """The ranks that rank 0 has named, and why."""
        return self._members(_LOST)

    def tolerate(self) -> None:
        """Rank 0: from now on the ranks go on without one that is lost."""
        self._store.set(_TOLERATED, "")

    def are_tolerated(self) -> bool:
        """Whether rank 0 has said that the ranks go on."""
        return bool(self._store.check([_TOLERATED]))

    def set_deadline(self, seconds: float) -> None:
        """Rank 0: after how many seconds a rank that is waited for counts as lost."""
        self._store.set(_DEADLINE, str(seconds))

    def deadline_s(self) -> float | None:
        """What rank 0 has set; None before that."""
        return float(self._store.get(_DEADLINE)) if self._store.check([_DEADLINE]) else None

    def _add(self, key: str, rank: Rank, why: str) -> None:
        self._store.append(key, json.dumps([rank, why]) + "\n")

    def _members(self, key: str) -> dict[Rank, str]:
        if not self._store.check([key]):
            return {}
        return dict(json.loads(line) for line in self._store.get(key).decode().splitlines())
