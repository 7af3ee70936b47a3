"""Staleness of applied updates, counted per worker in the steady state.

The window opens when every living worker has had its first update and closes before the first one finishes.
An update belongs to the window if it is applied inside it. An interval between two updates of a worker is
therefore counted if the opening cuts it, and not if the end cuts it. These two errors cancel: the mean
staleness is N − 1 even if the window holds few updates. (Counting from each worker's own first update would
lose intervals at both ends, above all long ones, and make the mean too small by a share of N/updates.)
"""

from __future__ import annotations

from typing import Any

import torch


class Tally:
    """Counts from when all workers have had their first update until the first one finishes.

    Until then (for ever, if a worker never sends one) it counts after each worker's own first update.
    """

    def __init__(self, num_workers: int) -> None:
        self.applied = 0
        self.dropped = 0
        self.lost = 0
        """Updates that had been acknowledged and died with their shard."""
        self._histograms: list[dict[int, int]] = [{} for _ in range(num_workers)]
        self._seen = [False] * num_workers
        self._awaited = set(range(num_workers))
        self._is_closed = False
        self._table: torch.Tensor | None = None

    def add(self, src: int, staleness: int) -> None:
        """One update of worker `src` was applied."""
        self.applied += 1
        if self._seen[src] and not self._is_closed:
            self._histograms[src][staleness] = self._histograms[src].get(staleness, 0) + 1
        self._arrived(src)

    def drop(self, src: int) -> None:
        """One update of worker `src` was refused."""
        self.dropped += 1
        self._arrived(src)

    def leave(self, src: int) -> None:
        """Worker `src` died: its first update is no longer awaited."""
        self._arrived(src)

    def close(self) -> None:
        """A worker finished: what follows is not the steady state."""
        if not self._is_closed:
            self._is_closed, self._table = True, None

    def _arrived(self, src: int) -> None:
        self._seen[src] = True
        if src in self._awaited:
            self._awaited.discard(src)
            if not self._awaited and not self._is_closed:
                for histogram in self._histograms:
                    histogram.clear()

    def counts(self) -> torch.Tensor:
        """Number of updates per worker and staleness: int64, shape (workers, largest staleness + 1)."""
        if self._table is not None and self._is_closed:  # counting has ended
            return self._table
        width = max((s for h in self._histograms for s in h), default=0) + 1
        table = torch.zeros(len(self._histograms), width, dtype=torch.int64)
        for src, histogram in enumerate(self._histograms):
            for staleness, count in histogram.items():
                table[src, staleness] = count
        self._table = table
        return table

    def totals(self) -> dict[str, int]:
        """Plain counters for a message header."""
        return {"applied": self.applied, "dropped": self.dropped, "lost": self.lost}


def summarize(tables: list[torch.Tensor], totals: list[dict[str, Any]]) -> dict[str, Any]:
    """Over all shards: mean, largest, histogram (overall and per worker), applied, dropped, lost."""
    width = max((t.shape[1] for t in tables), default=1)
    total = torch.zeros(tables[0].shape[0] if tables else 0, width, dtype=torch.int64)
    for t in tables:
        total[:, : t.shape[1]] += t
    overall = total.sum(dim=0)
    count = int(overall.sum())
    values = torch.arange(width)
    return {
        "staleness_mean": float((overall * values).sum()) / count if count else 0.0,
        "staleness_max": int(overall.nonzero().max()) if count else 0,
        "staleness_histogram": overall.tolist(),
        "staleness_per_worker": total.tolist(),
        "updates_counted": count,
        **{f"updates_{name}": sum(int(t[name]) for t in totals) for name in ("applied", "dropped", "lost")},
    }
