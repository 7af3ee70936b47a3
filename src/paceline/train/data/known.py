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
    """All batches that were handed out and of which tensors are left; of equal memory, the newest."""

    def __init__(self) -> None:
        self._by_storage: dict[StorageWeakRef, dict[tuple[int, int], HandedBatch]] = {}
        self._kinds: set[tuple[int, int, bool]] = set()
        self._limit = _FEWEST

    @property
    def are_alike(self) -> bool:
        """Whether it makes no difference which of them is meant."""
        return len(self._kinds) < 2

    def add(self, batch: HandedBatch) -> None:
        """A batch is handed out."""
        self._kinds.add(_kind(batch))
        for storage, extent in batch.memory.items():
            self._by_storage.setdefault(storage, {})[extent] = batch
        if len(self._by_storage) > self._limit:
            self._by_storage = {s: b for s, b in self._by_storage.items() if not s.expired()}  # type: ignore[no-untyped-call]
            left = [batch, *(b for extents in self._by_storage.values() for b in extents.values())]
            self._kinds = {_kind(b) for b in left}
            self._limit = max(_FEWEST, 2 * len(self._by_storage))

    def among(self, memory: Memory) -> Sequence[HandedBatch]:
        """Those whose tensors lie in this memory, more than any other's; several if equally many do."""
        found: dict[int, HandedBatch] = {}
        for storage, extent in memory.items():
            extents = self._by_storage.get(storage, {})
            same = extents.get(extent)
            for b in extents.values() if same is None else (same,):
                found[b.number] = b
        return most_in(found.values(), memory) if found else []


def _kind(batch: HandedBatch) -> tuple[int, int, bool]:
    return batch.own, batch.every, batch.is_last
