"""The sharded loader: every sample once per epoch over all ranks, and a position to resume at."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import (
    DataLoader,
)

from paceline.types import Communicator

BatchBegins = Callable[[int, int, bool], None]
"""(samples of this rank, samples of all ranks, whether it is the epoch's last batch)"""


class ShardedLoader(abc.ABC):
    """What `prepare` returns for a DataLoader; iterate it as the original.

    `epoch` counts the passes, `step` the batches handed out in the current one. A pass that was left early
    (`break`) counts as over.
    """

    def __init__(self, source: DataLoader[Any], comm: Communicator, *, seed: int) -> None:
        self.dataset = source.dataset
        self.batch_size = source.batch_size
        self.source = source
        self.epoch = 0
        self.step = 0
        self._comm = comm
        self._seed = seed
        self._resumed = False
        self._generator = torch.Generator()
        self.on_batch: list[BatchBegins] = []
        self.on_boundary: list[Callable[[], None]] = []
        self.on_end: list[Callable[[], None]] = []

    def __iter__(self) -> Iterator[Any]:
        if self.step and not self._resumed:
            self.epoch, self.step = self.epoch + 1, 0
        start, self._resumed = self.step, False
        # The inner loader draws from its own generator, never from the global one: a resumed run and a
        # continued one see the same random numbers.
        self._generator.manual_seed(mix(self._seed, self.epoch, self._comm.rank))
        batches = self._batches(start)
        try:
            while True:
                for at_boundary in self.on_boundary:  # before the fetch, which may draw random numbers
                    at_boundary()
                item = next(batches, None)
                if item is None:
                    break
                self.step += 1
                for begin in self.on_batch:
                    begin(*item[1:])
                yield item[0]
        except GeneratorExit:  # the loop was left: this pass is over
            self.epoch, self.step = self.epoch + 1, 0
            raise
        for end in self.on_end:
            end()
        self.epoch, self.step = self.epoch + 1, 0

    @abc.abstractmethod
    def _batches(self, start: int) -> Iterator[tuple[Any, int, int, bool]]:
        """Yield (batch, own samples, all samples, is last) from round `start` of the epoch."""

    def state_dict(self) -> dict[str, Any]:
        """Position in the data: plain values and tensors."""
        return {"epoch": self.epoch, "step": self.step, "seed": self._seed}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a position."""
        self.epoch, self.step, self._seed = state["epoch"], state["step"], state["seed"]
        self._resumed = self.step > 0

    def _inner(self, dataset: Any, **different: Any) -> DataLoader[Any]:
        """A DataLoader with the user's settings, but our choice of samples."""
        source = self.source
        settings: dict[str, Any] = {
            name: getattr(source, name)
            for name in (
                "num_workers",
                "collate_fn",
                "pin_memory",
                "timeout",
                "worker_init_fn",
                "multiprocessing_context",
                "prefetch_factor",
                "persistent_workers",
            )
        }
        return DataLoader(dataset, generator=self._generator, **{**settings, **different})


def mix(seed: int, epoch: int, stream: int) -> int:
    """One 63-bit number for (seed, epoch, stream): neighbours are unrelated (splitmix64's finaliser)."""
    x = (seed * 0x9E3779B97F4A7C15 + epoch * 0xBF58476D1CE4E5B9 + stream * 0x94D049BB133111EB) & (2**64 - 1)
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return (x ^ (x >> 31)) >> 1
