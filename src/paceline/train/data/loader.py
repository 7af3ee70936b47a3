"""The sharded loader: every sample once per epoch over all ranks, and a position to resume at."""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.utils.data import DataLoader

from paceline.errors import CheckpointError, ConfigError
from paceline.train.data.batch_sizes import Measured
from paceline.train.data.handed_out import HandedBatch, LoaderPass, apart
from paceline.train.data.sharding import busy_ranks
from paceline.types import Communicator

BatchBegins = Callable[[int, int, bool], object]
"""(samples of this rank, samples of all ranks, whether it is the epoch's last batch); False: no training."""
MeetingContext = Callable[[], AbstractContextManager[None]]
"""Makes the context of what all ranks do together."""


class ShardedLoader(abc.ABC):
    """What `prepare` returns for a DataLoader; iterate it as the original, whose attributes it has.

    `epoch` counts the passes, `step` the batches handed out in the current one. A pass that was left early
    (`break`) counts as over; one that was left before any of its batches was trained does not count, so that
    a rank may look ahead. Every iterator is a pass of its own.

    In a short minibatch a rank may have no samples. It then gets earlier ones again, which train nothing; in
    an evaluation it gets no batch, unless the loop calls `job.gather_for_metrics`, which leaves them out.
    `own_samples` says how many of the batch at hand count.
    """

    def __init__(self, source: DataLoader[Any], comm: Communicator, *, seed: int) -> None:
        self.source = source
        self.epoch = 0
        self.step = 0
        self.own_samples = 0
        """Samples of this rank in the batch handed out last; 0 if it repeats earlier ones."""
        self.leaves_out_ranks = False
        """Whether ranks got no batch where the others have the one handed out last."""
        self.is_gathered = False
        """Whether loops gather what all ranks computed of a batch: every rank then gets every batch."""
        self._comm = comm
        self._seed = seed
        self._resumed = False
        self._round_size = 0  # samples of all ranks in a full minibatch; 0 if batches have sizes of their own
        self._unit = 1  # of the order, in one minibatch: samples, or batches that a batch sampler makes
        self._offset = 0  # units that the pass leaves out: they made no whole minibatch when it was resumed
        self._next = 0  # the number of the next pass
        self.left_out = 0
        """How many of the next iterations are empty: passes of the epoch that a checkpoint was saved in."""
        self._open: list[LoaderPass] = []
        self.measured: Measured | None = None
        """What counts the samples of a batch once it is collated; None: they are known."""
        self.on_batch: list[BatchBegins] = []
        self.on_boundary: list[Callable[[], None]] = []
        self.on_end: list[Callable[[LoaderPass], None]] = []
        self.newest: HandedBatch | None = None
        """What was handed out last."""
        self.on_dropped: list[Callable[[int, int], None]] = []
        """Called with batches and samples that were handed out and not trained."""
        self.on_trained: Callable[[], None] | None = None
        """Called once, when a batch has been trained."""
        self.progress: Callable[[], object] | None = None
        """Another value whenever something was trained; None: what is handed out is trained."""
        self.meeting: MeetingContext = nullcontext
        """Around what the ranks tell each other at a fetch."""
        self.evaluates: Callable[[], bool] | None = None
        """Whether all models that this trains, or else all, are in evaluation mode now."""

    def __getattr__(self, name: str) -> Any:
        """Whatever else the user's loader has: dataset, batch_size, sampler, num_workers, collate_fn, …"""
        if name.startswith("__") or name == "source":
            raise AttributeError(name)
        return getattr(self.source, name)

    def __iter__(self) -> Iterator[Any]:
        if self.left_out:
            self.left_out -= 1
            return
        one = self._begin()
        batches = self._batches(one.number, one.step)
        try:
            while True:
                for at_boundary in self.on_boundary:  # before the fetch, which may draw random numbers
                    at_boundary()
                item = next(batches, None)
                self._settle()
                if one.is_counted and self.on_trained is not None:  # on all ranks: they can be compared
                    check, self.on_trained = self.on_trained, None
                    with self.meeting():
                        check()
                if item is None:
                    one.is_counted = one.is_counted or one.start > 0  # nothing may have been left to resume
                    break
                batch, own, total, is_last = item
                one.step += 1
                self.epoch, self.step, self.own_samples = one.number, one.step, own
                self.leaves_out_ranks = self._lacks(own, total) and self._only_evaluates(one)
                if own == 0 and self.leaves_out_ranks:
                    continue
                one.is_counted = one.is_counted or self.progress is None
                if own == 0:
                    batch = apart(batch)
                self.newest = HandedBatch(batch, own, total, is_last, self, one)
                if own and self.measured is not None:
                    self.newest.counted = self.measured.other_than(own, batch)
                said = [begin(own, total, is_last) for begin in self.on_batch]
                self._settle()  # a minibatch that ends when this batch begins was another pass'
                if False not in said:
                    one.handed = (one.handed[0] + 1, one.handed[1] + total)
                yield batch
            for end in self.on_end:
                end(one)
        finally:
            self._end(one)

    def _only_evaluates(self, one: LoaderPass) -> bool:
        """Whether nothing is trained on a pass: sums over it shall have every sample once.

        With gradients, and none of its batches seen yet, a model may be about to be trained in evaluation
        mode.
        """
        if self.is_gathered or self.evaluates is None or not self.evaluates():
            return False
        return not torch.is_grad_enabled() or (one.handed[0] > 0 and not one.is_counted)

    def _lacks(self, own: int, total: int) -> bool:
        """Whether there are ranks without samples in a minibatch; of batches of other sizes, this one."""
        size = self._comm.size
        return own == 0 or total < size or (total < self._round_size and busy_ranks(total, size) < size)

    def untrained(self) -> tuple[int, int]:
        """Batches, and samples of all ranks, that were counted and have not been trained so far."""
        self._settle()
        looked = [one.handed for one in self._open if not one.is_counted]
        return sum(batches for batches, _ in looked), sum(samples for _, samples in looked)

    def _begin(self) -> LoaderPass:
        self._settle()
        progress = None if self.progress is None else self.progress()
        start, resumed, self._resumed = self.step, self._resumed, False
        if resumed:
            one = LoaderPass(self.epoch, start, progress)
        else:
            self._offset = 0
            uncertain = [p for p in self._open if not p.is_counted]
            if uncertain and self._comm.size > 1:
                raise ConfigError(
                    "an iterator over this loader is open, nothing was trained on its batches, and another"
                    " one begins: the ranks could not tell which samples are whose. To look at a batch, use"
                    " next(iter(loader)) without keeping the iterator; for two iterators at once, prepare"
                    " two loaders: first, second = job.prepare(DataLoader(…), DataLoader(…))"
                )
            one = LoaderPass(max([self._next, *(p.number + 1 for p in self._open)]), 0, progress)
        self._open.append(one)
        return one

    def _settle(self) -> None:
        if self.progress is not None:
            now = self.progress()
            for one in self._open:
                one.settle(now)

    def _end(self, one: LoaderPass) -> None:
        self._settle()
        self._open.remove(one)
        one.is_open = False
        if one.is_counted:
            self._next = max(self._next, one.number + 1)
            if not self._open:
                self._offset = 0  # the pass to come is whole
        elif one.handed[0]:
            for dropped in self.on_dropped:
                dropped(*one.handed)
            if one.start or self._offset:  # only looked at: it can still be resumed
                self.set_position(one.number, one.start, self._offset)
                return
        current = self._open[-1] if self._open else None
        self.epoch, self.step = (self._next, 0) if current is None else (current.number, current.step)

    def retrieve(self, one: LoaderPass) -> None:
        """A batch of this pass is trained: a pass that is over, and was only looked at so far, counts now."""
        if one.is_open or one.is_counted or not one.handed[0]:
            return
        one.is_counted = True
        self._next = max(self._next, one.number + 1)
        self.epoch, self.step = self._next, 0
        for dropped in self.on_dropped:
            dropped(-one.handed[0], -one.handed[1])

    @property
    def is_open(self) -> bool:
        """Whether an iterator over it has begun and is not over."""
        return bool(self._open)

    @property
    def local_batch_size(self) -> int:
        """Samples in a full batch of this rank; 0 if the source does not say."""
        return -(-self._round_size // self._comm.size)

    @abc.abstractmethod
    def _batches(self, number: int, start: int) -> Iterator[tuple[Any, int, int, bool]]:
        """Yield (batch, own samples, all samples, is last) from round `start` of pass `number`."""

    def state_dict(self) -> dict[str, Any]:
        """Position in the data: plain values and tensors."""
        position = {"epoch": self.epoch, "step": self.step, "seed": self._seed}
        cursor = self._offset + self.step * self._unit
        return {**position, "cursor": cursor, "unit": self._unit, "kind": type(self).__name__}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a position, exactly after the samples that were trained.

        Another batch size or number of ranks makes other minibatches of the rest of the epoch.
        """
        if state["kind"] != type(self).__name__:
            raise CheckpointError(
                f"the checkpoint's loader was a {state['kind']}, here it is a {type(self).__name__}: prepare"
                " it as before (kind of data set, shard)"
            )
        self._seed = state["seed"]
        if state["step"] and state["unit"] != self._unit and (reason := self._why_not_other_steps()):
            raise CheckpointError(
                "the checkpoint was saved inside an epoch with another batch size or number of ranks, which"
                f" {reason}: resume with those of the checkpoint, or save at the end of an epoch"
            )
        step, offset = divmod(state["cursor"], self._unit)
        self.set_position(state["epoch"], step, offset)

    def _why_not_other_steps(self) -> str:
        """Why the rest of an epoch cannot be divided into other minibatches; empty if it can."""
        return ""

    def load_elsewhere(self, state: dict[str, Any]) -> None:
        """Continue at rank 0's position in a job of another size."""
        self.load_state_dict(state)

    def set_position(self, epoch: int, step: int, offset: int = 0) -> None:
        """The next iteration is pass `epoch`, without its first `offset` units, from its batch `step` on."""
        self.epoch, self.step, self._next, self._offset = epoch, step, epoch, offset
        self._resumed = step > 0 or offset > 0

    def skip(self, count: int) -> None:
        """The next pass begins after its first `count` batches.

        Raises:
            ConfigError: A pass is open, or another position was set by a checkpoint.
        """
        if self._open or (self._resumed and (self.step, self._offset) != (count, 0)):
            raise ConfigError(
                "skip_first_batches: an iterator over this loader is open; skip before the pass begins"
                if self._open
                else f"skip_first_batches(loader, {count}): the next pass begins after {self.step} batches"
                " already, by job.load or by skip_first_batches; call one of them, once for each pass"
            )
        if count and not self._resumed:
            self.set_position(self._next, count)
            self._pass_begins()

    def _pass_begins(self) -> None:  # noqa: B027  most loaders draw by seed and pass
        """The pass that begins at a later batch has not been begun before."""

    def set_epoch(self, epoch: int) -> None:
        """As DistributedSampler's: the next iteration takes the order of pass `epoch`.

        Args:
            epoch: At least 0; the same on all ranks. Where a pass is resumed, its order stays.
        """
        part: Any
        for part in (self.source.dataset, self.source.sampler, self.source.batch_sampler):
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)
        if not self._resumed and not self._open:
            self.set_position(epoch, 0)

    def _inner(self, dataset: Any, generator: torch.Generator, **different: Any) -> DataLoader[Any]:
        """A DataLoader with the user's settings, but our choice of samples."""
        return DataLoader(dataset, generator=generator, **{**settings(self.source), **different})


def known_length(loader: object) -> int | None:
    """`len(loader)`; None for a stream that does not know it."""
    try:
        return len(loader)  # type: ignore[arg-type]
    except TypeError:
        return None


def settings(source: DataLoader[Any]) -> dict[str, Any]:
    """How a DataLoader loads, without its choice of samples and its generator."""
    names = (
        "num_workers",
        "collate_fn",
        "pin_memory",
        "timeout",
        "worker_init_fn",
        "multiprocessing_context",
        "prefetch_factor",
        "persistent_workers",
        "pin_memory_device",
        "in_order",
    )
    return {name: getattr(source, name) for name in names if hasattr(source, name)}


def mix(seed: int, epoch: int, stream: int) -> int:
    """One 63-bit number for (seed, epoch, stream): neighbours are unrelated (splitmix64's finaliser)."""
    x = (seed * 0x9E3779B97F4A7C15 + epoch * 0xBF58476D1CE4E5B9 + stream * 0x94D049BB133111EB) & (2**64 - 1)
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return (x ^ (x >> 31)) >> 1
