"""Workers that have not ended and will not: rank 0 gave them up, or they are stopped."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

from paceline.comm.rendezvous.lost_ranks import LostRanks
from paceline.launchers.processes.worker_process import WorkerProcess
from paceline.types import Rank

_INTERVAL_S = 0.5
_LEAVING_S = 5.0  # for a process that is about to end by itself
_DEADLINE_S = 600.0  # until rank 0 has said another one


class LossWatch:
    """Ends the workers of this host that the job has to do without.

    Args:
        lost_ranks: What rank 0 says.
        is_elastic: Whether the job continues without workers that rank 0 gave up.
    """

    def __init__(self, lost_ranks: LostRanks, *, is_elastic: bool) -> None:
        self._lost_ranks, self._is_elastic = lost_ranks, is_elastic
        self._next_look = 0.0
        self._lost_since: dict[Rank, float] = {}
        self._stopped_since: dict[Rank, float] = {}
        self.lost: dict[Rank, str] = {}
        """The ranks of any host that rank 0 gave up, and why."""

    def add_ended(self, rank: Rank) -> None:
        """Tell rank 0 that the process of `rank` has ended."""
        self._lost_ranks.add_ended(rank)

    def are_tolerated(self) -> bool:
        """Whether the ranks go on without one: from `prepare` with a method that can."""
        return self._lost_ranks.are_tolerated()

    def look(self, workers: Sequence[WorkerProcess], *, at_once: bool = False) -> None:
        """Called often; looks now and then, or now."""
        now = time.monotonic()
        if now < self._next_look and not at_once:
            return
        self._next_look = now + _INTERVAL_S
        if self._is_elastic:
            self.lost = self._lost_ranks.lost()
        for worker in workers:
            if worker.exit_code is not None:
                continue
            if worker.rank in self.lost:
                if now - self._lost_since.setdefault(worker.rank, now) > _LEAVING_S:
                    worker.give_up(self.lost[worker.rank])
            elif not _is_stopped(worker.pid):
                self._stopped_since.pop(worker.rank, None)
            elif now - self._stopped_since.setdefault(worker.rank, now) > self._deadline_s():
                worker.give_up(f"it has been stopped (SIGSTOP) for {self._deadline_s():g} s")

    def _deadline_s(self) -> float:
        return self._lost_ranks.deadline_s() or _DEADLINE_S


def _is_stopped(pid: int) -> bool:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return text[text.rindex(")") + 2] in "Tt"
