"""Elastic training: commit, and continue from the last commit when workers are lost or join.

`paceline run --max-restarts` restarts all workers when one is lost or a node joins, so a commit must outlive
its process: rank 0 writes it to a file (`HOROVOD_ELASTIC_COMMIT`, else one per job in the temporary folder),
and after a restart `run` reads it back before the function starts; another job never does. Within a process,
`HorovodInternalError` restores from memory.
"""

from __future__ import annotations

import copy
import functools
import io
import os
import pickle
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import Dataset, Sampler

from paceline.compat.horovod import functions as f
from paceline.compat.horovod import world
from paceline.compat.horovod.commit_file import CommitFile
from paceline.compat.horovod.constants import HorovodInternalError, HostsUpdatedInterrupt


def _commit_file() -> CommitFile:
    return CommitFile(world.current().job.options)


class State:
    """What survives the loss of a worker: `commit` saves, `restore` goes back, `sync` copies rank 0's."""

    def __init__(self) -> None:
        self._reset_callbacks: list[Callable[[], None]] = []

    def register_reset_callbacks(self, callbacks: list[Callable[[], None]]) -> None:
        """Functions to call after the set of workers changed, for instance to rescale the learning rate."""
        self._reset_callbacks.extend(callbacks)

    def on_reset(self) -> None:
        """Call the reset callbacks."""
        for callback in self._reset_callbacks:
            callback()

    def commit(self) -> None:
        """Save in memory, and by rank 0 in the commit file."""
        self.save()
        if world.rank() == 0:
            _commit_file().write(self.saved())

    def check_host_updates(self) -> None:
        """Exist for compatibility: membership changes arrive as a restart of all workers."""

    def save(self) -> None:
        """Keep a copy in this process's memory."""
        raise NotImplementedError

    def restore(self) -> None:
        """Go back to what was saved."""
        raise NotImplementedError

    def sync(self) -> None:
        """Take over rank 0's state."""
        raise NotImplementedError

    def saved(self) -> dict[str, Any]:
        """Return the saved state as plain values and tensors."""
        raise NotImplementedError

    def load_saved(self, saved: dict[str, Any]) -> None:
        """Replace the saved state (then `restore`)."""
        raise NotImplementedError


class ObjectState(State):
    """Attributes given as keyword arguments: `state.epoch`, `state.batch`."""

    def __init__(self, bcast_object: object = None, get_rank: object = None, **kwargs: object) -> None:
        super().__init__()
        self._values = list(kwargs)
        self._saved: dict[str, Any] = {}
        for name, value in kwargs.items():
            setattr(self, name, value)
        self.save()

    def save(self) -> None:
        """Save the attributes in memory."""
        self._saved = {name: copy.deepcopy(getattr(self, name)) for name in self._values}

    def restore(self) -> None:
        """Set the attributes to what was saved."""
        for name, value in self._saved.items():
            setattr(self, name, copy.deepcopy(value))

    def sync(self) -> None:
        """Take over rank 0's attributes."""
        if self._values:
            self._saved = f.broadcast_object(
                {n: getattr(self, n) for n in self._values}, name="elastic.state"
            )
            ObjectState.restore(self)  # only the attributes: models are in step already

    def saved(self) -> dict[str, Any]:
        """Return the saved attributes."""
        buffer = io.BytesIO()
        pickle.dump(self._saved, buffer)
        return {"values": torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)}

    def load_saved(self, saved: dict[str, Any]) -> None:
        """Replace the saved attributes."""
        self._saved = pickle.loads(bytes(saved["values"].numpy()))


_STATEFUL = (torch.nn.Module, torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler)


class TorchState(ObjectState):
    """Models, optimizers, schedulers and samplers besides plain attributes."""

    def __init__(self, model: object = None, optimizer: object = None, **kwargs: object) -> None:
        everything = {"model": model, "optimizer": optimizer, **kwargs}
        stateful = {k: v for k, v in everything.items() if isinstance(v, (*_STATEFUL, ElasticSampler))}
        self._stateful = list(stateful)
        self._states: dict[str, Any] = {}
        for name, value in stateful.items():
            setattr(self, name, value)
        super().__init__(**{k: v for k, v in everything.items() if k not in stateful and v is not None})

    def save(self) -> None:
        """Save everything in memory; samplers with what all ranks have processed."""
        for name in self._stateful:
            value = getattr(self, name)
            state = copy.deepcopy(value.state_dict())
            if isinstance(value, ElasticSampler) and world.is_initialized():
                everyone = f.allgather_object(value.processed_indices, name=f"elastic.{name}")
                state["processed_indices"] = sorted(set().union(*everyone))
            self._states[name] = state
        super().save()

    def restore(self) -> None:
        """Load what was saved."""
        for name, state in self._states.items():
            getattr(self, name).load_state_dict(copy.deepcopy(state))
        super().restore()

    def sync(self) -> None:
        """Take over rank 0's models, optimizers and attributes."""
        for name in self._stateful:
            value = getattr(self, name)
            if isinstance(value, torch.nn.Module):
                f.broadcast_parameters(value.state_dict(), root_rank=0)
            elif isinstance(value, torch.optim.Optimizer):
                f.broadcast_optimizer_state(value, root_rank=0)
            else:
                value.load_state_dict(f.broadcast_object(value.state_dict(), name=f"elastic.{name}"))
        super().sync()
        self.save()

    def saved(self) -> dict[str, Any]:
        return {**super().saved(), "states": self._states}

    def load_saved(self, saved: dict[str, Any]) -> None:
        super().load_saved(saved)
        self._states = saved["states"]


class ElasticSampler(Sampler[int]):
    """Deals out the samples that no rank has processed in this epoch, over the ranks there are now."""

    def __init__(self, dataset: Dataset[Any], shuffle: bool = True, seed: int = 0) -> None:
        self.dataset, self.shuffle, self.seed = dataset, shuffle, seed
        self.epoch = 0
        self.processed_indices: set[int] = set()
        self.remaining_indices: list[int] = []
        self.reset()

    def set_epoch(self, epoch: int) -> None:
        """Start an epoch: forget what was processed."""
        self.epoch = epoch
        self.processed_indices = set()
        self.reset()

    @property
    def processed_num(self) -> int:
        """Number of samples that were processed in this epoch."""
        return len(self.processed_indices)

    def record_batch(self, batch_idx: int, batch_size: int) -> None:
        """Note that this rank has processed its batch number `batch_idx`."""
        self.record_indices(self.get_indices(batch_idx, batch_size))

    def record_indices(self, indices: list[int] | set[int]) -> None:
        """Note that these samples were processed."""
        self.processed_indices.update(indices)

    def get_indices(self, batch_idx: int, batch_size: int) -> list[int]:
        """Return the samples of this rank's batch number `batch_idx`."""
        return self.indices[batch_idx * batch_size : (batch_idx + 1) * batch_size]

    def reset(self) -> None:
        """Deal out the remaining samples again."""
        rank, size = (world.rank(), world.size()) if world.is_initialized() else (0, 1)
        every = range(len(self.dataset))  # type: ignore[arg-type]
        self.remaining_indices = [i for i in every if i not in self.processed_indices]
        if self.shuffle:
            random.Random(self.seed + self.epoch).shuffle(self.remaining_indices)
        # Equal shares, because every rank takes part in every step; at most size − 1 samples repeat.
        share = -(-len(self.remaining_indices) // size)
        padded = (self.remaining_indices * 2)[: share * size] if self.remaining_indices else []
        self.indices = padded[rank::size]

    def state_dict(self) -> dict[str, Any]:
        """Return epoch and processed samples."""
        return {"epoch": self.epoch, "processed_indices": sorted(self.processed_indices)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load, and deal out what is left."""
        self.epoch = state_dict["epoch"]
        self.processed_indices = set(state_dict["processed_indices"])
        self.reset()

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)

    def __len__(self) -> int:
        return len(self.indices)


def run(func: Callable[..., Any]) -> Callable[..., Any]:
    """Decorate `train(state, …)`: it starts from rank 0's state, and after a failure from the last commit."""

    @functools.wraps(func)
    def wrapper(state: State, *args: object, **kwargs: object) -> object:
        os.environ["HOROVOD_ELASTIC"] = "1"
        saved = _commit_file().read() if world.rank() == 0 else None
        if saved is not None:
            state.load_saved(saved)
            state.restore()
            state.on_reset()
        while True:
            state.sync()
            try:
                result = func(state, *args, **kwargs)
            except HorovodInternalError:
                if os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0") not in ("", "0"):
                    raise  # the launcher restarts all workers; the commit file carries the state
                state.restore()
            except HostsUpdatedInterrupt:
                state.save()
            else:
                if world.rank() == 0:
                    _commit_file().remove()
                return result
            world.shutdown()
            world.init()
            state.on_reset()

    return wrapper
