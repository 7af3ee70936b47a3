"""Staleness of applied updates, counted per worker."""

from __future__ import annotations

from typing import Any

import torch


class Tally:
    """Counts after each worker's first update and until the first worker finishes (the steady state)."""

    def __init__(self, num_workers: int) -> None:
        self.applied = 0
        self.dropped = 0
        self.lost = 0
        """Updates that had been acknowledged and died with their shard."""
        self._histograms: list[dict[int, int]] = [{} for _ in range(num_workers)]
        self._seen = [False] * num_workers
        self._is_open = True
        self._table: torch.Tensor | None = None

    def add(self, src: int, staleness: int) -> None:
        """One update of worker `src` was applied."""
        self.applied += 1
        if self._seen[src] and self._is_open:
            self._histograms[src][staleness] = self._histograms[src].get(staleness, 0) + 1
        self._seen[src] = True

    def close(self) -> None:
        """A worker finished: what follows is not the steady state."""
        self._is_open = False

    def counts(self) -> torch.Tensor:
        """int64, shape (workers, largest staleness + 1)."""
        if self._table is not None and not self._is_open:
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
