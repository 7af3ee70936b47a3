"""The loaders of a job, and which models learn the sizes of their batches."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import nn

from paceline.errors import ConfigError
from paceline.train.data.batch_sizes import BatchSizeOf
from paceline.train.data.handed_out import LoaderPass, Trainee
from paceline.train.data.in_hand import BatchesInHand
from paceline.train.data.loader import BatchBegins, MeetingContext, ShardedLoader
from paceline.train.data.shard import shard
from paceline.types import Communicator


class Follower(Trainee, Protocol):
    """A prepared model that learns the weights of batches."""

    has_loader: bool
    num_backwards: int
    hands: BatchesInHand | None

    def data_ends(self) -> None: ...


class Loaders(Sequence[ShardedLoader]):
    """A job's prepared loaders, in order.

    Models prepared together with a loader follow it; a model prepared without one follows all. What is handed
    out without gradients, while all followers are in evaluation mode, is no training.

    Args:
        comm: The job's communicator.
        seed: Of the order of samples; None: rank 0's seed of torch.
        followers: The job's prepared models, now and later.
        on_batch: Called after the followers, for each batch to train on.
        on_boundary: Called before each batch.
        on_dropped: Called with batches, and samples of all ranks, that were only looked at.
        meeting: Around what the ranks tell each other at a fetch.
    """

    def __init__(
        self,
        comm: Communicator,
        seed: int | None,
        followers: Sequence[Follower],
        *,
        on_batch: BatchBegins,
        on_boundary: Callable[[], None],
        on_dropped: Callable[[int, int], None],
        meeting: MeetingContext,
    ) -> None:
        self._comm, self._followers = comm, followers
        self.seed = seed
        """Of the order of samples in loaders that are added from now on; None: rank 0's seed of torch."""
        self._on_batch, self._on_boundary, self._on_dropped = on_batch, on_boundary, on_dropped
        self._meeting = meeting
        self._all: list[ShardedLoader] = []
        self._own: dict[int, list[ShardedLoader]] = {}  # by model
        self._of_no_model: list[ShardedLoader] = []  # prepared alone: any model may be trained on it
        self._is_closed = False
        self._begun_at: list[int] = []  # the pass of each loader with which the epoch began
        self._outermost: LoaderPass | None = None  # of the passes that are open, the one that began first
        self._before: list[int] = []  # the pass of each loader when that one began
        self.hands = BatchesInHand(comm.rank, lambda one, loader: loader in self._loaders_of(one))

    def __len__(self) -> int:
        return len(self._all)

    def __getitem__(self, index: Any) -> Any:
        return self._all[index]

    def add(
        self,
        source: Any,
        models: Sequence[nn.Module],
        *,
        per_worker: bool,
        divided: bool,
        batch_size_of: BatchSizeOf | None = None,
    ) -> ShardedLoader:
        """Stand in for a DataLoader; ConfigError if it cannot be divided.

        Args:
            source: The DataLoader, or a loader that was prepared before.
            models: The models that are prepared with it.
            per_worker: Whether its batch size counts per worker.
            divided: Whether its samples are divided over the ranks.
            batch_size_of: The number of samples of a ready-made batch; None: it is found out.
        """
        if isinstance(source, ShardedLoader):
            source = source.source
        loader = shard(
            source,
            self._comm,
            seed=self._next_seed(),
            per_worker=per_worker,
            divided=divided,
            batch_size_of=batch_size_of,
        )
        loader.on_batch.append(lambda own, every, is_last: self._begin(loader, own, every, is_last))
        loader.on_end.append(lambda one: self._end(loader, one))
        loader.on_boundary.append(self._at_boundary)
        loader.on_dropped.append(self._on_dropped)
        loader.meeting = self._meeting
        loader.progress = lambda: self._progress(loader)
        loader.evaluates = lambda: self._evaluates(loader)
        self._all.append(loader)
        if not models:
            self._of_no_model.append(loader)
        for model in models:
            self._own.setdefault(id(model), []).append(loader)
        for follower in self._following(loader):
            follower.has_loader = True
        return loader

    def welcome(self, follower: Follower) -> None:
        """A model was prepared, perhaps again: it follows the loaders that there are."""
        follower.has_loader = bool(self._own.get(id(follower.module)) or self._all)
        follower.hands = self.hands

    def close(self) -> None:
        """Hand out no more batches: each rank would go on training alone."""
        self._is_closed = True

    def check_open(self, who: str) -> None:
        """ConfigError if the job is closed."""
        if self._is_closed:
            raise ConfigError(
                f"{who} is closed, and its models are no longer trained together: call job.close() after the"
                " last batch, or paceline.init() and prepare for another training"
            )

    def _at_boundary(self) -> None:
        self.check_open("the job of this loader")
        self._on_boundary()

    def epoch_begins(self) -> None:
        """Passes count from here on; one that is still open is the epoch before's."""
        self._begun_at = [loader.epoch + loader.is_open - loader.left_out for loader in self._all]

    def passes_done(self) -> list[int]:
        """Of each loader, how many passes of the epoch in progress are over."""
        return self._since_the_epoch_began([loader.epoch for loader in self._all])

    def passes_to_leave_out(self) -> list[int]:
        """Of each loader, how many passes come before the place where a loop goes on that is resumed here.

        Not those inside a pass that is not over: the loop makes one for each of its batches.
        """
        is_amid = self._outermost is not None and self._outermost.is_open
        return self._since_the_epoch_began(self._before) if is_amid else self.passes_done()

    def _since_the_epoch_began(self, epochs: Sequence[int]) -> list[int]:
        """How many passes each loader had been through; loaders that were added later are at their first."""
        begun_at = [*self._begun_at, *(0 for _ in self._all[len(self._begun_at) :])]
        now = [*epochs, *begun_at[len(epochs) :]]
        return [max(0, epoch - first) for epoch, first in zip(now, begun_at, strict=True)]

    def are_through(self) -> bool:
        """Whether the epoch in progress has had its passes.

        A loader that was trained on in an earlier epoch, and not in this one, is still to come.
        """
        done = self.passes_done()
        is_to_come = any(first and not now for first, now in zip(self._begun_at, done, strict=False))
        return not any(loader.step for loader in self._all) and not is_to_come and (any(done) or not done)

    def untrained(self) -> tuple[int, int]:
        """Batches, and samples of all ranks, that were counted and that nothing was trained on so far."""
        each = [loader.untrained() for loader in self._all]
        return sum(batches for batches, _ in each), sum(samples for _, samples in each)

    def _begin(self, loader: ShardedLoader, own: int, every: int, is_last: bool) -> bool:
        following = [one for one in self._following(loader) if one.module.training or torch.is_grad_enabled()]
        assert loader.newest is not None
        loader.newest.following = following
        if following and (self._outermost is None or not self._outermost.is_open):
            self._outermost, self._before = loader.newest.one, [other.epoch for other in self._all]
        self.hands.hand_out(loader.newest)
        if following or not self._followers:
            self._on_batch(own, every, is_last)
            return True
        return False

    def _evaluates(self, loader: ShardedLoader) -> bool:
        concerned = self._following(loader) or self._followers
        return bool(concerned) and not any(one.module.training for one in concerned)

    def _progress(self, loader: ShardedLoader) -> object:
        """Another value after each backward pass of those that follow; without any, always another."""
        return [one.num_backwards for one in self._following(loader)] or object()

    def _end(self, loader: ShardedLoader, ended: LoaderPass) -> None:
        if self.hands.is_waited_for(ended):  # batches that were fetched ahead are still to be trained
            return
        if not ended.handed[0] and not ended.start:  # it was an evaluation
            return
        for one in self._following(loader):
            one.data_ends()

    def _following(self, loader: ShardedLoader) -> list[Follower]:
        return [one for one in self._followers if loader in self._loaders_of(one)]

    def _loaders_of(self, follower: Trainee) -> Sequence[ShardedLoader]:
        own = self._own.get(id(follower.module))
        return [*own, *self._of_no_model] if own else self._all

    def _next_seed(self) -> int:
        """Rank 0's seed on every rank, so that all draw the same order."""
        own = self.seed if self.seed is not None else torch.initial_seed()
        seed = torch.tensor([own & (2**62 - 1)])
        self._comm.broadcast(seed).wait()
        return int(seed) + len(self._all)
