"""The loader over a data set with indices: the order of the epoch, and this rank's part of each round."""

from __future__ import annotations

import contextlib
import zlib
from array import array
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, RandomSampler, SequentialSampler

from paceline.errors import ConfigError
from paceline.train import plain
from paceline.train.data.evaluation import generators
from paceline.train.data.fingerprint import digest
from paceline.train.data.loader import ShardedLoader, mix
from paceline.train.data.sharding import (
    BatchRounds,
    OrderedRounds,
    Rounds,
    divides_itself,
    finite,
    is_distributed,
    number_of_rounds,
    plain_key,
)
from paceline.types import Communicator

_DEEPEST = 4
"""How far into the things that a sampler holds its changes are looked for."""
_WHOLE_BYTES = 1 << 30
"""Of larger tensors that it holds, and of files, parts are looked at."""


class MapLoader(ShardedLoader):
    """A dataset with indices. The order is drawn from (seed, epoch), the same for any number of ranks.

    That of a sampler of the user's own is drawn when the loader is made, so that a rank may look at the first
    batch alone, and once more if the sampler was changed before the pass begins.
    """

    def __init__(self, source: DataLoader[Any], comm: Communicator, *, seed: int, per_worker: bool) -> None:
        super().__init__(source, comm, seed=seed)
        self._per_worker = per_worker
        self._drawn: torch.Tensor | None = None  # the order that a custom sampler drew last, flattened
        self._lengths: torch.Tensor | None = None
        self._is_new = False  # whether the pass that begins at a later batch draws its own order
        self._drawn_for: list[Any] = []  # the pass that it is for, and the sampler's own epoch
        self._seen: Any = None  # what the sampler held after it drew
        self._length_then: int | None = None  # its length then
        self._moved: list[tuple[torch.Generator, torch.Tensor, torch.Tensor]] = []  # states before and after
        self._begun: list[Rounds] = []  # of the passes that go on; the one that began last is last
        self._kept: tuple[DataLoader[Any], _Choice, torch.Generator] | None = None  # with persistent workers
        self._is_kept_busy = False
        if source.batch_size is None and source.batch_sampler is None:
            raise ConfigError(
                "a DataLoader with batch_size=None over a dataset with indices cannot be sharded;"
                " give it a batch_size, or a batch_sampler"
            )
        self._sampler: Any = source.sampler
        self._sampler_epoch = 0
        self._has_batch_sampler = source.batch_size is None
        round_size, self._drop_last = source.batch_size, source.drop_last
        if self._has_batch_sampler:
            batches: Any = source.batch_sampler
            self._sampler = batches
            if type(batches) is BatchSampler and is_distributed(batches.sampler):  # it gives shares
                self._has_batch_sampler, self._sampler = False, batches.sampler
                round_size, self._drop_last = batches.batch_size, batches.drop_last
        if divides_itself(self._sampler):
            raise ConfigError(
                f"{type(self._sampler).__name__} gives each rank a share by its own rules: prepare the"
                " loader with job.prepare(…, shard=False), or without that sampler"
            )
        self._sampler_epoch = getattr(self._sampler, "epoch", 0)
        self._round_size = (round_size or 0) * (comm.size if per_worker else 1)
        self._unit = self._round_size or (comm.size if per_worker else 1)
        self._plan(0)  # bad sizes are errors now, not after the first epoch began

    def __len__(self) -> int:
        """Minibatches of the pass that goes on; between passes, of the pass to come."""
        if self._begun:
            return len(self._begun[-1])
        units = self._coming_units() - (self._offset if self._resumed else 0)
        if self._has_batch_sampler:
            return number_of_rounds(units, self._unit, drop_last=False)
        return number_of_rounds(units, self._round_size, drop_last=self._drop_last)

    def state_dict(self) -> dict[str, Any]:
        """Position, and the order that a custom sampler drew (it could not be drawn again)."""
        drawn = {"drawn": self._drawn, "lengths": self._lengths, "drawn_for": list(self._drawn_for)}
        return {**super().state_dict(), **drawn}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue at a position."""
        super().load_state_dict(state)
        self._drawn, self._lengths = state["drawn"], state["lengths"]
        self._drawn_for = list(state["drawn_for"])
        self._is_new = False

    def _pass_begins(self) -> None:
        self._is_new = True

    def _batches(self, number: int, start: int) -> Iterator[tuple[Any, int, int, bool]]:
        begins_later = start > 0 or self._offset > 0
        is_resumed, self._is_new = begins_later and not self._is_new, False
        if begins_later and self._offset + start * self._unit >= self._num_units(
            number, is_resumed=is_resumed
        ):
            return  # all was trained before it was saved, or is skipped
        rounds = self._plan(number, is_resumed=is_resumed)
        # Workers draw their augmentations from a stream that begins with the epoch: replay it.
        replayed = start if self.source.num_workers else 0
        is_kept = bool(self.source.persistent_workers) and not self._is_kept_busy
        inner, choice, generator = self._loader(is_kept=is_kept)
        choice.set(rounds, start - replayed)
        generator.manual_seed(mix(self._seed, number, self._comm.rank))
        self._is_kept_busy = self._is_kept_busy or is_kept
        self._begun.append(rounds)
        try:
            batches = iter(inner)
            for _ in range(replayed):
                next(batches)
            for index in range(start, len(rounds)):
                own, total = len(rounds.own(index)), rounds.total(index)
                yield next(batches), own, total, index == len(rounds) - 1
        finally:
            self._begun.remove(rounds)
            if is_kept:
                self._is_kept_busy = False

    def _loader(self, *, is_kept: bool) -> tuple[DataLoader[Any], _Choice, torch.Generator]:
        """A loader for one pass; the one with the persistent workers, unless it serves another pass."""
        if is_kept and self._kept is not None:
            return self._kept
        choice, generator = _Choice(), torch.Generator()
        different: dict[str, Any] = {"batch_sampler": choice}
        if self._comm.size > 1:
            different["collate_fn"] = _Collate(self.source.collate_fn, self._comm.rank)
        if not is_kept:
            different["persistent_workers"] = False
        made = self._inner(self.source.dataset, generator, **different), choice, generator
        if is_kept:
            self._kept = made
        return made

    def _plan(self, number: int, *, is_resumed: bool = False) -> Rounds:
        rank, size = self._comm.rank, self._comm.size
        order = self._order(number, is_resumed=is_resumed)
        if self._has_batch_sampler:
            assert self._lengths is not None
            batches = [part.tolist() for part in torch.split(order, self._lengths.tolist())][self._offset :]
            return BatchRounds(batches, rank, size, whole=self._per_worker)
        return OrderedRounds(order[self._offset :], self._round_size, rank, size, drop_last=self._drop_last)

    def _num_units(self, number: int, *, is_resumed: bool) -> int:
        order = self._order(number, is_resumed=is_resumed)
        return order.numel() if self._lengths is None or not self._has_batch_sampler else len(self._lengths)

    def _coming_units(self) -> int:
        """Samples, or batches of a batch sampler, of the pass to come; nothing is drawn for it.

        A sampler that has the length that it had when it drew gives as much again: on ranks other than 0,
        where it never draws, it may not know better.
        """
        if self._only_orders():
            return len(self.source.dataset)  # type: ignore[arg-type]
        now = _length(self._sampler)
        if self._drawn is None:
            return 0 if now is None else now
        assert self._lengths is not None
        drawn = len(self._lengths)
        is_resumed = self._resumed and not self._is_new
        return drawn if is_resumed or now is None or now == self._length_then else now

    def _only_orders(self) -> bool:
        """Whether the sampler gives each sample once: only its wishes are taken, it never draws."""
        sampler = self._sampler
        if type(sampler) is RandomSampler:
            return not sampler.replacement and sampler.num_samples == len(self.source.dataset)  # type: ignore[arg-type]
        return type(sampler) is SequentialSampler or is_distributed(sampler)

    def _order(self, number: int, *, is_resumed: bool) -> torch.Tensor:
        count, sampler = len(self.source.dataset), self._sampler  # type: ignore[arg-type]
        if self._only_orders():
            if type(sampler) is RandomSampler:
                return self._permutation(number, count)
            if type(sampler) is SequentialSampler or not sampler.shuffle:
                return torch.arange(count)
            if sampler.epoch != self._sampler_epoch:
                self._sampler_epoch = -1  # the user calls set_epoch: it says which order
            return self._permutation(sampler.epoch if self._sampler_epoch == -1 else number, count)
        # Drawn once per pass: a rank that only looks at a batch draws nothing, the others need not be there.
        wanted = [number, getattr(sampler, "epoch", None)]
        is_drawn = self._drawn is not None and (is_resumed or wanted == self._drawn_for)
        if not is_drawn or (not is_resumed and self._facts() != self._seen):
            if is_drawn:
                self._rewind()
            self._draw()
            self._drawn_for = wanted
        assert self._drawn is not None
        return self._drawn

    def _facts(self) -> Any:
        """What the sampler holds. Each rank compares its own: the loop changes it on all ranks or on none."""
        return [_length(self._sampler), _held(self._sampler, self.source.dataset)]

    def _rewind(self) -> None:
        """Generators that only the last draw has moved are as before it: an order is drawn once."""
        for generator, before, after in self._moved:
            if torch.equal(generator.get_state(), after):
                generator.set_state(before)

    def _permutation(self, number: int, count: int) -> torch.Tensor:
        generator = torch.Generator()
        generator.manual_seed(mix(self._seed, number, -1))
        return torch.randperm(count, generator=generator)

    def _draw(self) -> None:
        """Rank 0's sampler decides; the others receive its indices, or its error."""
        before = [(one, one.get_state()) for one in generators(self.source)]
        flat: Any = array("q")  # eight bytes for each index: samplers may be huge
        lengths: list[int] = []
        error = None
        if self._comm.rank == 0:
            try:
                for item in finite(self._sampler, len(self.source.dataset)):  # type: ignore[arg-type]
                    batch = plain_key(list(item) if self._has_batch_sampler else [item])
                    flat.extend(batch)
                    lengths.append(len(batch))
            except TypeError as unknown:
                error = (
                    f"the sampler gives other things than whole numbers ({unknown}); such samplers cannot be"
                    " sharded. Shard inside the dataset and pass shard=False to prepare()"
                )
            except ConfigError as endless:
                error = str(endless)
        if error is not None:
            flat, lengths = array("q"), []
        indices = torch.frombuffer(flat, dtype=torch.int64) if flat else torch.empty(0, dtype=torch.int64)
        facts: list[Any] = [indices, torch.tensor(lengths, dtype=torch.int64), error]
        if self._comm.size > 1:
            facts = plain.broadcast(facts, self._comm)
        self._drawn, self._lengths, error = facts
        if error is not None:
            raise ConfigError(error)
        self._moved = [(one, state, one.get_state()) for one, state in before]
        self._seen, self._length_then = self._facts(), _length(self._sampler)


def _length(thing: Any) -> int | None:
    """Its length, if it knows it: some samplers do once they have drawn, which only rank 0's does."""
    with contextlib.suppress(Exception):
        return len(thing)
    return None


def _held(value: Any, dataset: Any, depth: int = 0) -> Any:
    """What a sampler holds, to be compared with what it held before; of data sets, only the length."""
    if value is dataset or isinstance(value, Dataset):
        return _length(value)
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        return value
    if isinstance(value, torch.Generator):
        return value.initial_seed()  # not its state: only rank 0's sampler draws
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return digest(value, whole=value.nbytes <= _WHOLE_BYTES and not isinstance(value, np.memmap))
    if depth > _DEEPEST:
        return type(value).__qualname__
    if isinstance(value, (list, tuple, range, set, frozenset, deque)):
        for kind in "qd":
            try:
                return len(value), kind, zlib.crc32(array(kind, value))
            except (TypeError, OverflowError):  # other things than whole numbers, or than numbers
                continue
        return [_held(one, dataset, depth + 1) for one in value]
    if isinstance(value, Mapping):
        return {repr(key): _held(one, dataset, depth + 1) for key, one in value.items()}
    if callable(value) or isinstance(value, nn.Module) or not hasattr(value, "__dict__"):
        return type(value).__qualname__
    return {name: _held(one, dataset, depth + 1) for name, one in vars(value).items()}


class _Collate:
    """The user's collate function; where it leaves out all samples of a rank's share, the error says so."""

    def __init__(self, collate: Callable[[Any], Any], rank: int) -> None:
        self._collate, self._rank = collate, rank

    def __call__(self, samples: Any) -> Any:
        try:
            return self._collate(samples)
        except (IndexError, ValueError, RuntimeError) as error:
            said = str(error)
            if not isinstance(error, IndexError) and "empty" not in said and "at least one" not in said:
                raise
            raise ConfigError(
                f"rank {self._rank}: collate_fn made no batch of this rank's {len(samples)} samples"
                f" ({type(error).__name__}: {said}). If it leaves samples out: a rank's share is smaller than"
                " the batch, and all of it may be left out. Let it keep at least one sample, and say"
                " job.weight(samples that count in this batch) before each backward pass, 0 where none does;"
                " or leave the samples out of the data set, before prepare()"
            ) from error


class _Choice(BatchSampler):
    """The inner loader's batch sampler: this rank's part of the current epoch."""

    def __init__(self) -> None:
        self._rounds: Rounds | None = None
        self._start = 0

    def set(self, rounds: Rounds, start: int) -> None:
        self._rounds, self._start = rounds, start

    def __iter__(self) -> Iterator[list[int]]:
        assert self._rounds is not None
        for index in range(self._start, len(self._rounds)):
            yield self._rounds.batch(index)

    def __len__(self) -> int:
        return 0 if self._rounds is None else len(self._rounds) - self._start
