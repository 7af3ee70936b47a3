"""The user's handle on a distributed training job."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from paceline.comm.communicator import FabricCommunicator
from paceline.comm.fabric import for_device
from paceline.comm.rendezvous.meeting import Meeting
from paceline.errors import ConfigError
from paceline.options import JobOptions
from paceline.strategies.base.strategy import TrainingStrategy, make
from paceline.train import checkpoint as checkpoints
from paceline.train import exchange, persistence, preparation, statistics
from paceline.train.attachment import Attachment
from paceline.train.clock import TrainingClock
from paceline.train.data.loader import ShardedLoader, shard
from paceline.train.evaluate import Forward, evaluate
from paceline.train.logs.logbook import Logbook
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
        self.logbook = Logbook(self.options.log_dir, self.options.log_to)
        self.clock = TrainingClock(comm)
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
        *others: Any,
        strategy: str | TrainingStrategy | None = None,
        accumulation_steps: int = 1,
        batch: str = "per_worker",
        shard: bool = True,
        scheduler: Any = None,
        scaler: Any = None,
        precision: str | None = None,
    ) -> Any:
        """Make model, optimizer(s) and loader(s) ready; returns what was given, in the same order.

        `others`: an optimizer or a list of them, then a DataLoader or a list of them; each may be left out.
        The model and the optimizers are the same objects afterwards; a loader becomes a `ShardedLoader`.
        `strategy` is a spec such as "local_sgd(period=16)"; default all_reduce. The loss must be a mean over
        the batch. BatchNorm statistics stay local while training and are averaged over the ranks for
        evaluation and at the end. `accumulation_steps`: backward passes per step. `batch`: whether the batch
        size counts "per_worker" or is the "global" one, divided over the ranks. `shard=False`: each rank's
        loader already gives its own data. `scheduler` (or a list) and `scaler` are only registered, so
        that checkpoints hold them. `precision`: "fp32", or "bf16" / "fp16" for autocast, fp16 with loss
        scaling of its own. Preparing a model again replaces its earlier preparation. For a model on the CPU,
        malloc of this process keeps what a step frees (`heap.keep_freed_memory`).
        Raises ConfigError for what cannot be prepared, Mismatch when ranks prepare different things.
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

    def register(self, **things: Any) -> None:
        """Include objects with state_dict and load_state_dict in checkpoints: `register(ema=ema)`."""
        for name, thing in things.items():
            if not (hasattr(thing, "state_dict") and hasattr(thing, "load_state_dict")):
                raise ConfigError(
                    f"register({name}=…): {type(thing).__name__} has no state_dict/load_state_dict"
                )
            self.registered[name] = thing

    def _prepared(self, item: Any, *, batch: str, divided: bool) -> Any:
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
        """Yield 0 … count-1 (from where a checkpoint left off); synchronises the replicas at the end."""
        if isinstance(count, bool) or not isinstance(count, int) or count < 0:
            raise ConfigError(f"job.epochs({count!r}): a whole number >= 0 expected")
        return self._epochs(count)

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
        self.logbook.sum_up(self)

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
        data: Any,
        metrics: Mapping[str, Any],
        *,
        batch_size: int | None = None,
        forward: Forward | None = None,
    ) -> dict[str, Any]:
        """Measure the consensus model on all of `data` (a Dataset or DataLoader); all ranks call it.

        `metrics`: name → callable `(outputs, targets) -> (sum, count)` over a batch, giving Σ sum / Σ count;
        or a torchmetrics-like object (update, compute, reset), which sees all samples on every rank. Each
        sample counts once for any number of ranks and any size; an empty set is a ConfigError. Batches are
        (inputs…, targets); otherwise give `forward(model, batch) -> (outputs, targets)`. Training goes on as
        if nothing had happened. Every rank gets the same result.
        """
        inner = self.unwrap(model)
        attachments = [a for a in self.attachments if a.replica.module is inner]
        with self.clock.paused():
            return evaluate(
                model, data, metrics, self.comm, attachments, batch_size=batch_size, forward=forward
            )

    def save(self, path: str | os.PathLike[str], *, extra: Mapping[str, Any] | None = None) -> None:
        """Write a checkpoint to folder `path`; all ranks call it, after optimizer.step().

        A run that is loaded from it continues bit for bit like this one. Raises CheckpointError (on all
        ranks) when it cannot be written; the checkpoint that was there before stays valid.
        """
        with self.clock.paused():
            checkpoints.write(path, persistence.collect(self, extra), self.comm)

    def load(self, path: str | os.PathLike[str]) -> dict[str, Any]:
        """Continue from a checkpoint; all ranks call it, after `prepare` and before `epochs`.

        Returns the `extra` given to `save`. Raises CheckpointError when it is damaged or does not fit.
        """
        with self.clock.paused():
            return persistence.restore(self, *checkpoints.read(path, self.comm))

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
        """Where `epochs` begins, and the seconds trained before (from a checkpoint)."""
        self._resume_at = next_epoch
        self.clock.set(training_s)
        self.logbook.resume(self)

    def _boundary(self) -> None:
        """Between two steps: stop here if the ranks agreed to."""
        if self._stop is None:
            return
        between = not any(a.is_mid_window for a in self.attachments)
        if self._stop.must_stop(self.step, may_stop=between):
            assert self.checkpoint is not None
            self.save(self.checkpoint)
            if self.is_main:
                print(
                    f"paceline: SIGTERM: saved {self.checkpoint} after step {self.step}; run the same command"
                    " again to continue",
                    file=sys.stderr,
                    flush=True,
                )
            raise Preempted

    def _after_update(self) -> None:
        self.step += 1
        self._boundary()

    def all_reduce_metrics(self, values: Mapping[str, Any]) -> dict[str, float]:
        """{"loss": (sum, count), …} of every rank → {"loss": mean, …}; plain numbers are added up."""
        return exchange.all_reduce_metrics(values, self.comm)

    def gather_objects(self, value: Any) -> list[Any]:
        """Every rank's plain value (numbers, strings, lists, dicts, tensors), in rank order; no pickle."""
        return exchange.gather_objects(value, self.comm)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        for one in self.attachments:
            one.strategy.rest()
        self.comm.barrier().wait()

    def print(self, *values: Any, **keywords: Any) -> None:
        """`print` on rank 0 only."""
        if self.is_main:
            self._progress.print(*values, **keywords)

    def log(self, values: Mapping[str, Any] | None = None, /, **more: Any) -> None:
        """Write a row (rank 0) with epoch, step, throughput, bytes and waiting: see train.logbook."""
        self.logbook.record(self, {**(values or {}), **more})

    def unwrap(self, model: nn.Module) -> nn.Module:
        """The user's own module, without what torch.compile put around it."""
        inner: nn.Module = getattr(model, "_orig_mod", model)
        return inner

    def stats(self) -> dict[str, Any]:
        """Plain values of this rank: what was trained, how long it waited, what it sent.

        `payload_bytes`, `wait_s` and `operations` cover the whole job; `training` leaves out preparation,
        evaluation and checkpoints. Payload bytes are what this rank handed to operations (see comm.ledger).
        """
        return statistics.collect(self)

    def close(self) -> None:
        """Leave the job; idempotent, also called at exit."""
        self._progress.end()
        if self._stop is not None:
            self._stop.close()
        self.logbook.close(self)
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


def _listed(item: Any) -> list[Any]:
    return list(item) if isinstance(item, (list, tuple)) else [item]
