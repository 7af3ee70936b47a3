"""Which batches a rank evaluates: over all ranks each sample once, in the batches of one process.

A prepared loader with `shard=False`, and data without indices, are what the user's loader gives; of data with
indices, the loader's choice of samples is divided, with all its other settings.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler, SequentialSampler

from paceline.errors import ConfigError
from paceline.train import plain, random_state
from paceline.train.data.fingerprint import check_same, dataset_digest, digest
from paceline.train.data.loader import ShardedLoader, settings
from paceline.train.data.sharding import divides_itself, finite, is_distributed, plain_key, share
from paceline.train.data.streams import OwnLoader
from paceline.types import Communicator

_DEFAULT_BATCH = 256
_OWN_DATA = (
    "Where each rank has data of its own, evaluate a loader that was prepared with"
    " job.prepare(loader, shard=False); otherwise give all ranks the same data, in the same order"
)
Batches = Iterator[tuple[int, Any]]
"""Batches with their place in the data's order."""


def own_batches(data: Any, comm: Communicator, batch_size: int | None) -> Batches:
    """This rank's batches; together the ranks' batches are the whole set, each sample once.

    Args:
        data: A dataset, a DataLoader, or a prepared loader.
        comm: The ranks; all call this and take all batches.
        batch_size: Samples per batch; None: the loader's, or 256.
    """
    if isinstance(data, OwnLoader):
        before = comm.rank << 40  # rank after rank
        return ((before + i, batch) for i, batch in enumerate(data.source))
    source = data.source if isinstance(data, ShardedLoader) else data
    loader = source if isinstance(source, DataLoader) else None
    dataset: Any = source if loader is None else loader.dataset
    replaced = loader is not None and type(loader).__iter__ is not DataLoader.__iter__
    if isinstance(dataset, IterableDataset) or replaced:
        whole = DataLoader(dataset, batch_size=batch_size or _DEFAULT_BATCH) if loader is None else loader
        return _dealt(whole, comm)
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise ConfigError(f"evaluate: a Dataset or a DataLoader expected, got {type(data).__name__}")
    own = dataset_digest(dataset, may_fetch=loader is None or loader.num_workers == 0)
    check_same("evaluate: the data set", own, comm, _OWN_DATA)
    if loader is None:
        return _of_dataset(dataset, comm, batch_size or _DEFAULT_BATCH)
    return _of_loader(loader, comm, batch_size)


def _of_dataset(dataset: Any, comm: Communicator, batch_size: int) -> Batches:
    """Nobody has chosen batches: the samples are divided evenly."""
    low, high = share(len(dataset), comm.rank, comm.size)
    if not len(dataset):
        raise ConfigError("evaluate: the data set is empty: there is nothing to measure")
    batches = DataLoader(dataset, sampler=range(low, high), batch_size=batch_size)
    return ((low + i * batch_size, batch) for i, batch in enumerate(batches))


def _of_loader(loader: DataLoader[Any], comm: Communicator, batch_size: int | None) -> Batches:
    """Whole batches are divided: collate functions and metrics see what they see in one process."""
    keys, is_batched = _chosen(loader, comm, batch_size)
    if not len(keys):
        raise ConfigError("evaluate: the data set is empty: there is nothing to measure")
    low, high = share(len(keys), comm.rank, comm.size)
    own: Any = keys[low:high]
    choice = {"batch_sampler": own} if is_batched else {"batch_size": None, "sampler": own}
    kept = settings(loader)
    kept["persistent_workers"] = False  # they would outlive the evaluation
    batches = DataLoader(loader.dataset, generator=loader.generator, **{**kept, **choice})
    return ((low + i, batch) for i, batch in enumerate(batches))


def _chosen(
    loader: DataLoader[Any], comm: Communicator, batch_size: int | None
) -> tuple[Sequence[Any], bool]:
    """The keys of all batches, and whether a batch has several keys (else the dataset gives batches)."""
    count = len(loader.dataset)  # type: ignore[arg-type]
    if loader.batch_size is None and loader.batch_sampler is None:
        every = _everything(loader, loader.sampler)
        return every if every is not None else _drawn(loader.sampler, count, comm), False
    sampler: Any = loader.sampler
    size = batch_size or loader.batch_size
    if loader.batch_size is None:
        sampler = loader.batch_sampler
        if type(sampler) is BatchSampler and is_distributed(sampler.sampler):
            size, sampler = size or sampler.batch_size, sampler.sampler
    every = _everything(loader, sampler)
    drawn = every if every is not None else _drawn(sampler, count, comm)
    if loader.batch_size is None and every is None:
        if size is None:
            return drawn, True
        drawn = [key for batch in list[Any](drawn) for key in batch]
    assert size is not None
    return [list(drawn[i : i + size]) for i in range(0, len(drawn), size)], True


def _everything(loader: DataLoader[Any], sampler: Any) -> Sequence[int] | None:
    """All indices, where the sampler only orders them or shares them out; else None."""
    if divides_itself(sampler):
        raise ConfigError(
            f"evaluate: {type(sampler).__name__} gives each rank a share, which cannot be seen into. "
            + _OWN_DATA
        )
    count = len(loader.dataset)  # type: ignore[arg-type]
    if type(sampler) is SequentialSampler or is_distributed(sampler):
        return range(count)
    if type(sampler) is RandomSampler and not sampler.replacement and sampler.num_samples == count:
        return range(count)
    return None


def _drawn(sampler: Any, count: int, comm: Communicator) -> list[Any]:
    """Rank 0's sampler decides; the others receive its keys, or its error."""
    keys: list[Any] = []
    error = None
    if comm.rank == 0:
        try:
            keys = [plain_key(one) for one in finite(sampler, count)]
        except (TypeError, ConfigError) as unknown:
            error = str(unknown)
    keys, error = plain.broadcast([keys, error], comm)
    if error is not None:
        raise ConfigError(f"evaluate: the sampler {type(sampler).__name__}: {error}")
    return keys


def _dealt(loader: DataLoader[Any], comm: Communicator) -> Batches:
    """Every rank reads the whole stream, from equal random states, and takes every P-th batch."""
    _refuse_shares(loader)
    if comm.size == 1:
        yield from enumerate(loader)
        return
    state = plain.broadcast(random_state.capture(), comm)
    items: Any = None
    facts = 0
    count = 0
    while True:
        own = random_state.capture()
        random_state.restore(state)
        items = iter(loader) if items is None else items
        batch = next(items, loader)  # the loader itself stands for the end
        state = random_state.capture()
        random_state.restore(own)
        if batch is loader:
            break
        facts = digest([facts, digest(batch)])
        if count % comm.size == comm.rank:
            yield count, batch
        count += 1
    check_same("evaluate: the stream of batches", digest([count, facts]), comm, _OWN_DATA)


def _refuse_shares(loader: DataLoader[Any]) -> None:
    """A DistributedSampler beside a replaced `__iter__` has divided the data already."""
    samplers = [loader.sampler, loader.batch_sampler, getattr(loader.batch_sampler, "sampler", None)]
    if any(is_distributed(one) or divides_itself(one) for one in samplers):
        raise ConfigError(f"evaluate: {type(loader).__name__} gives each rank a share. {_OWN_DATA}")


def generators(data: Any) -> list[torch.Generator]:
    """The user's generators that an evaluation of `data` draws from."""
    source = data.source if isinstance(data, ShardedLoader) else data
    samplers = [getattr(source, name, None) for name in ("sampler", "batch_sampler")]
    samplers += [getattr(one, "sampler", None) for one in samplers]
    found = {id(g): g for one in (source, *samplers) if (g := getattr(one, "generator", None)) is not None}
    return [one for one in found.values() if isinstance(one, torch.Generator)]
