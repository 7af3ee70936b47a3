"""Batches whose tensors still exist, found by the memory of those."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch.multiprocessing.reductions import StorageWeakRef

from paceline.train.data.handed_out import HandedBatch, Memory

_FEWEST = 64


def most_in(batches: Iterable[HandedBatch], memory: Memory) -> list[HandedBatch]:
    """Those of which the most tensors are among `memory`, in the order of handing out; none have none."""
    counts = [(b.count_in(memory), b) for b in batches]
    most = max((count for count, _ in counts), default=0)
    return sorted((b for count, b in counts if count == most > 0), key=lambda b: b.number)


class KnownBatches:
    """All batches that were handed out and of which tensors are left."""

    def __init__(self) -> None:
        self._by_storage: dict[StorageWeakRef, list[HandedBatch]] = {}
        self._limit = _FEWEST

    def add(self, batch: HandedBatch) -> None:
        """A batch is handed out."""
        for storage in batch.memory:
            self._by_storage.setdefault(storage, []).append(batch)
        if len(self._by_storage) > self._limit:
            self._by_storage = {s: b for s, b in self._by_storage.items() if not s.expired()}  # type: ignore[no-untyped-call]
            self._limit = max(_FEWEST, 2 * len(self._by_storage))

    def among(self, memory: Memory) -> Sequence[HandedBatch]:
        """Those whose tensors lie in this memory, more than any other's; several if equally many do."""
        if not memory:
            return []
        found = {b.number: b for storage in memory for b in self._by_storage.get(storage, ())}
        return most_in(found.values(), memory)
