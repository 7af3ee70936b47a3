"""The user's handle on a distributed training job."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

from paceline.comm.communicator import FabricCommunicator
from paceline.comm.fabric import for_device
from paceline.comm.rendezvous.meeting import Meeting
from paceline.errors import ConfigError
from paceline.options import JobOptions
from paceline.spec import whole_number
from paceline.strategies.base.strategy import TrainingStrategy, make
from paceline.train import checkpoint as checkpoints
from paceline.train import exchange, persistence, preparation
from paceline.train.attachment import Attachment
from paceline.train.clock import TrainingClock
from paceline.train.data.loader import ShardedLoader
from paceline.train.data.shard import shard
from paceline.train.evaluate import Forward, evaluate
from paceline.train.logs.logbook import Logbook, TrainingCounts
from paceline.train.precision import MixedPrecision
from paceline.train.precision import check as check_precision
from paceline.train.preemption import Preempted, StopAgreement
from paceline.train.progress import ProgressBar

DEFAULT_STRATEGY = "all_reduce"


class Job:
    """P workers that train together. Made by `paceline.init()`."""

    def __init__(
        self,
        comm: FabricCommunicator,
        options: JobOptions | None = None,
        *,
        meeting: Meeting | None = None,
        checkpoint: str | None = None,
        progress: bool = False,
        seed: int | None = None,
    ) -> None:
        self.comm = comm
        self.options = options or JobOptions()
        self.meeting = meeting
        self.rank = comm.rank
        self.size = comm.size
        self.is_main = comm.rank == 0
        self.checkpoint = checkpoint
        self.epoch = 0
        self.step = 0
        """Minibatches handed out by prepared loaders, over all epochs."""
        self._is_drained = True  # no minibatch since the strategies were synchronised
        self.samples = 0
        """Samples of all ranks in those minibatches."""
        self.attachments: list[Attachment] = []
        self.loaders: list[ShardedLoader] = []
        self.registered: dict[str, Any] = {}
        """Schedulers, scalers and whatever else `save` includes, by name."""
        self._seed = seed
        self._progress = ProgressBar(enabled=progress and self.is_main, columns=self.options.bar_columns)
        self.clock = TrainingClock(comm)
        self.logbook = Logbook(
            self.rank,
            self.size,
            folder=self.options.log_dir,
            formats=self.options.log_to,
            store=None if meeting is None else meeting.store,
            gather=self._gather_rows,
        )
        self._comms: dict[torch.device, FabricCommunicator] = {}
        self._resume_at: int | None = None  # first epoch of the next `epochs`, set by `load`
        self._epoch_over: bool | None = None  # None outside `epochs`
        self._passes_before: list[int] = []
        self._stop: StopAgreement | None = None
        if (
            checkpoint is not None
            and meeting is not None
            and threading.current_thread() is threading.main_thread()
        ):
            self._stop = StopAgreement(meeting.store, self.rank, self.size)

    @property
    def strategy(self) -> TrainingStrategy:
        """The strategy of the model prepared last."""
        if not self.attachments:
            raise ConfigError("job.strategy: call job.prepare(model, optimizer, loader) first")
        return self.attachments[-1].strategy

    def prepare(
        self,
        model: nn.Module,
        *others: Any,  # what the caller gives comes back with its own types
        strategy: str | TrainingStrategy | None = None,
        accumulation_steps: int = 1,
        batch: str = "per_worker",
        shard: bool = True,
        scheduler: persistence.Stateful | Sequence[persistence.Stateful] | None = None,
        scaler: persistence.Stateful | None = None,
        precision: str | None = None,
    ) -> Any:
        """Make model, optimizers and loaders ready; all ranks call it. Returns what was given, in order.

        The model and the optimizers stay the same objects; a DataLoader becomes a `ShardedLoader`. The loss
        must be a mean over the batch. BatchNorm statistics stay local while training and are averaged over
        the ranks for evaluation and at the end. Preparing a model again replaces its earlier preparation. For
        a model on the CPU, malloc of this process keeps what a step frees (`heap.keep_freed_memory`).

        Args:
            model: The module to train, on the device where it trains.
            others: Its optimizer or a list of them, then a DataLoader or a list; each may be left out.
            strategy: A strategy string such as `"local_sgd(period=16)"`, or a strategy; default: all_reduce.
            accumulation_steps: Backward passes per optimizer step, at least 1; default 1.
            batch: Whether the loader's batch size counts `"per_worker"` (default), or is the `"global"` one,
                which is divided over the ranks.
            shard: False where each rank's loader already gives data of its own; default True.
            scheduler: A scheduler or a list of them, to be saved in checkpoints; you still step it.
            scaler: A GradScaler, to be saved in checkpoints.
            precision: `"fp32"`, or `"bf16"` or `"fp16"` for autocast, fp16 with loss scaling of its own.

        Raises:
            ConfigError: Something that cannot be prepared.
            Mismatch: Ranks prepare different models or settings.

        Example:
            `model, optimizer, loader = job.prepare(model, optimizer, loader, strategy="diloco")`
        """
        if batch not in ("per_worker", "global"):
            raise ConfigError(f"batch={batch!r}: 'per_worker' or 'global' expected")
        dtype = check_precision(precision)
        optimizers = [o for item in others for o in _listed(item) if isinstance(o, torch.optim.Optimizer)]
        inner = self.unwrap(model)
        chosen = make(self.options.strategy or strategy or DEFAULT_STRATEGY)
        with self.clock.paused():
            for old in [a for a in self.attachments if a.replica.module is inner]:
                old.strategy.synchronize()
                old.detach()
                self.attachments.remove(old)
            attachment = preparation.attach(
                inner, optimizers, chosen, self._comm_for(inner), accumulation_steps=accumulation_steps
            )
            self.attachments.append(attachment)
            attachment.on_update = self._after_update
            if dtype is not None:
                self.register(precision=MixedPrecision(dtype, attachment, attachment.comm))
            results = [self._prepared(item, batch=batch, divided=shard) for item in others]
        for i, one in enumerate(_listed(scheduler)):
            if one is not None:
                self.register(**{f"scheduler{i or ''}": one})
        if scaler is not None:
            self.register(scaler=scaler)
        return (model, *results) if results else model

    def _comm_for(self, model: nn.Module) -> FabricCommunicator:
        """What moves this model's tensors: on a GPU, a communicator beside the job's own."""
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        if device not in self._comms:
            self._comms[device] = for_device(self.comm, device)
        return self._comms[device]

    def register(self, **things: persistence.Stateful) -> None:
        """Include objects in checkpoints.

        Args:
            things: Objects with `state_dict` and `load_state_dict`, by name: `register(ema=ema)`.
        """
        for name, thing in things.items():
            if not (hasattr(thing, "state_dict") and hasattr(thing, "load_state_dict")):
                raise ConfigError(
                    f"register({name}=…): {type(thing).__name__} has no state_dict/load_state_dict"
                )
            self.registered[name] = thing

    def _prepared(self, item: object, *, batch: str, divided: bool) -> Any:
        if isinstance(item, (list, tuple)):
            return type(item)(self._prepared(one, batch=batch, divided=divided) for one in item)
        if item is None or isinstance(item, torch.optim.Optimizer):
            return item
        if isinstance(item, ShardedLoader):
            item = item.source
        loader = shard(
            item, self.comm, seed=self._data_seed(), per_worker=batch == "per_worker", divided=divided
        )
        attachments = self.attachments[-1:]
        for attachment in attachments:
            attachment.has_loader = True
            loader.on_batch.append(attachment.batch_begins)
            loader.on_end.append(attachment.data_ends)
        loader.on_batch.append(self._count)
        loader.on_boundary.append(self._boundary)
        self.loaders.append(loader)
        return loader

    def _data_seed(self) -> int:
        """Rank 0's seed on every rank, so that all draw the same order."""
        seed = torch.tensor([(self._seed if self._seed is not None else torch.initial_seed()) & (2**62 - 1)])
        self.comm.broadcast(seed).wait()
        return int(seed) + len(self.loaders)

    def epochs(self, count: int) -> Iterator[int]:
        """Yield the numbers of the epochs; synchronises the replicas after the last one.

        Args:
            count: Number of epochs in all; a resumed job begins where its checkpoint left off.
        """
        return self._epochs(whole_number("job.epochs: count", count, least=0))

    def _epochs(self, count: int) -> Iterator[int]:
        if self._resume_at is None and self.checkpoint is not None and self._epoch_over is None:
            self.resume()
        first, self._resume_at = self._resume_at or 0, None
        self.clock.start()
        for epoch in range(first, count):
            self.epoch, self._epoch_over = epoch, False
            self._passes_before = [loader.epoch for loader in self.loaders]
            self._progress.begin(f"epoch {epoch + 1}/{count}", [*self.loaders, None][0])
            yield epoch
            self._epoch_over = True
            self._progress.end()
        self.synchronize()
        self.clock.stop()
        self.sum_up()

    def synchronize(self) -> None:
        """Drain the strategies: afterwards all ranks hold the final model, bit for bit. All ranks call it."""
        for attachment in self.attachments:
            attachment.finish_minibatch()
            attachment.strategy.synchronize()
            if self.size > 1:
                preparation.average_buffers(attachment.replica.buffers(), attachment.comm)
        self._is_drained = True

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes inside only accumulate gradients; the next one outside sends their sum."""
        with ExitStack() as stack:
            for attachment in self.attachments:
                stack.enter_context(attachment.no_sync())
            yield

    def evaluate(
        self,
        model: nn.Module,
        data: Dataset[Any] | DataLoader[Any],
        metrics: Mapping[str, Any],
        *,
        batch_size: int | None = None,
        forward: Forward | None = None,
    ) -> dict[str, Any]:
        """Measure the consensus model; all ranks call it and get the same result.

        Each sample counts once for any number of ranks. Training continues as if nothing had happened.

        Args:
            model: A prepared model, or any other.
            data: A Dataset or DataLoader; batches are (inputs…, targets) unless `forward` says otherwise.
            metrics: Names and callables `(outputs, targets) -> (sum, count)` over a batch, which give
                Σ sum / Σ count; or torchmetrics-like objects (update, compute, reset), which see all samples.
            batch_size: Samples per forward pass of a Dataset; default 256, or the DataLoader's.
            forward: Callable `(model, batch) -> (outputs, targets)`; default: `model(*inputs)`.

        Raises:
            ConfigError: `data` is empty, or a metric returns something else.
        """
        inner = self.unwrap(model)
        attachments = [a for a in self.attachments if a.replica.module is inner]
        with self.clock.paused():
            return evaluate(
                model, data, metrics, self.comm, attachments, batch_size=batch_size, forward=forward
            )

    def save(self, path: str | os.PathLike[str], *, extra: Mapping[str, Any] | None = None) -> None:
        """Write a checkpoint; all ranks call it, after optimizer.step().

        A run that is loaded from it continues bit for bit like this one.

        Args:
            path: A folder that all ranks reach; a checkpoint that is there stays valid until this one is.
            extra: Plain values that `load` gives back.

        Raises:
            CheckpointError: On all ranks, when it cannot be written.
        """
        with self.clock.paused():
            checkpoints.write(path, self.collect_state(extra), self.comm)

    def load(self, path: str | os.PathLike[str]) -> dict[str, Any]:
        """Continue from a checkpoint; all ranks call it, after `prepare` and before `epochs`.

        Args:
            path: The folder that was given to `save`.

        Returns:
            The `extra` given to `save`.

        Raises:
            CheckpointError: It is damaged or does not fit this job.
        """
        with self.clock.paused():
            own, first, saved_size = checkpoints.read(path, self.comm)
            return self.restore_state(own, first, saved_size)

    def collect_state(self, extra: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """What a checkpoint holds of this rank, for code that writes files of its own. Collective.

        Args:
            extra: Plain values to include.
        """
        position = persistence.JobPosition(self.next_epoch, self.step, self.samples, self.clock.seconds)
        return persistence.collect(self._parts(), position, extra)

    def restore_state(self, own: dict[str, Any], first: dict[str, Any], saved_size: int) -> dict[str, Any]:
        """Continue from what `collect_state` gave; returns its `extra`. Collective, after `prepare`.

        Args:
            own: This rank's state.
            first: Rank 0's state.
            saved_size: Number of ranks at that time; with another one, only model, optimizers, registered
                objects and the epoch are taken.
        """
        position, extra = persistence.restore(self._parts(), own, first, saved_size)
        self.step, self.samples = position.step, position.samples
        self.set_resumed(position.next_epoch, position.training_s)
        return extra

    def _parts(self) -> persistence.JobParts:
        return persistence.JobParts(self.rank, self.size, self.attachments, self.loaders, self.registered)

    def resume(self) -> bool:
        """Load the job's checkpoint if there is one. The first `epochs` calls this by itself."""
        if self.checkpoint is None or not checkpoints.exists(self.checkpoint, self.comm):
            return False
        self.load(self.checkpoint)
        self.print(f"paceline: resumed from {self.checkpoint} at epoch {self._resume_at}, step {self.step}")
        return True

    @property
    def next_epoch(self) -> int:
        """The epoch at which a run that is loaded from a checkpoint made now goes on."""
        if self._epoch_over is None:
            return self._resume_at or 0
        passes = [loader.epoch for loader in self.loaders]
        in_pass = any(loader.step for loader in self.loaders)
        over = self._epoch_over or (not in_pass and (passes != self._passes_before or not passes))
        return self.epoch + int(over)

    def set_resumed(self, next_epoch: int, training_s: float) -> None:
        """Continue from a state that was not read by `load`.

        Args:
            next_epoch: Where `epochs` begins.
            training_s: Seconds trained before.
        """
        self._resume_at = next_epoch
        self.clock.set(training_s)
        self.logbook.resume(self._counts())

    def _boundary(self) -> None:
        """Between two steps: stop here if the ranks agreed to."""
        if self._stop is None:
            return
        between = not any(a.is_mid_window for a in self.attachments)
        if self._stop.must_stop(self.step, may_stop=between):
            assert self.checkpoint is not None
            self.save(self.checkpoint)
            raise Preempted(self.checkpoint, self.step, is_main=self.is_main)

    def _after_update(self) -> None:
        self.step += 1
        self._boundary()

    def all_reduce_metrics(self, values: Mapping[str, Any]) -> dict[str, float]:
        """Combine the metrics of all ranks; every rank gets the same result.

        Args:
            values: Names and (sum, count) pairs, which become Σ sum / Σ count; plain numbers are added up.
        """
        return exchange.all_reduce_metrics(values, self.comm)

    def gather_objects(self, value: object) -> list[Any]:
        """Every rank's value, in rank order; nothing is pickled.

        Args:
            value: Numbers, strings, lists, dicts and tensors.
        """
        return exchange.gather_objects(value, self.comm)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        for one in self.attachments:
            one.strategy.rest()
        self.comm.barrier().wait()

    def print(self, *values: object, **keywords: Any) -> None:
        """`print` on rank 0 only.

        Args:
            values: As for `print`.
            keywords: As for `print`.
        """
        if self.is_main:
            self._progress.print(*values, **keywords)

    def log(self, values: Mapping[str, Any] | None = None, /, **more: object) -> None:
        """Write a row with epoch, step, throughput, bytes and waiting to the log (rank 0).

        Args:
            values: Further columns: names and numbers, strings or one-element tensors.
            more: The same as keywords.
        """
        self.logbook.record(self._counts(), {**(values or {}), **more})

    def unwrap(self, model: nn.Module) -> nn.Module:
        """The user's own module, without what torch.compile put around it.

        Args:
            model: A module, compiled or not.
        """
        inner: nn.Module = getattr(model, "_orig_mod", model)
        return inner

    def stats(self) -> dict[str, Any]:
        """Plain values of this rank: what was trained, how long it waited, what it sent.

        `payload_bytes`, `wait_s` and `operations` cover the whole job; `training` leaves out preparation,
        evaluation and checkpoints. Payload bytes are what this rank handed to operations (see comm.ledger).
        """
        strategy = self.attachments[-1].strategy if self.attachments else None
        return {
            "rank": self.rank,
            "size": self.size,
            "fabric": self.comm.fabric,
            "strategy": None if strategy is None else strategy.name,
            "epoch": self.epoch,
            "steps": self.step,
            "samples": self.samples,
            "seconds": self.clock.seconds,
            "minibatches": sum(a.minibatches for a in self.attachments),
            "model_bytes": sum(a.replica.model_bytes for a in self.attachments),
            **self.comm.ledger.snapshot(),
            **({} if strategy is None else strategy.stats()),
            "training": {"payload_bytes": self.clock.payload_bytes, "wait_s": self.clock.wait_s},
        }

    def measure(self) -> dict[str, Any]:
        """The columns that every row of the log has: what happened since the row before."""
        return self.logbook.measure(self._counts())

    def sum_up(self) -> None:
        """Write one row per rank to the log; all ranks call it at the end of training."""
        self.logbook.sum_up(self.stats())

    def _counts(self) -> TrainingCounts:
        staleness = self.attachments[-1].strategy.stats().get("staleness") if self.attachments else None
        return TrainingCounts(
            epoch=self.epoch,
            step=self.step,
            seconds=self.clock.seconds,
            samples=self.samples,
            payload_bytes=self.clock.payload_bytes,
            wait_s=self.clock.wait_s,
            staleness=staleness,
        )

    def _gather_rows(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        with self.clock.paused():
            return self.gather_objects(row)

    def close(self) -> None:
        """Leave the job; idempotent, also called at exit."""
        self._progress.end()
        if self._stop is not None:
            self._stop.close()
        self.logbook.close(self.stats())
        for attachment in self.attachments:
            attachment.detach()
        is_good = self._is_drained and not hasattr(sys, "last_type")  # nor after an exception
        for comm in dict.fromkeys((*self._comms.values(), self.comm)):
            comm.close(goodbye=is_good)

    def _count(self, own_samples: int, all_samples: int, is_last: bool) -> None:
        self._is_drained = False
        self.step += 1
        self.samples += all_samples
        self._progress.advance()


def _listed(item: object) -> list[Any]:
    return list(item) if isinstance(item, (list, tuple)) else [item]
