"""The user's handle on a distributed training job."""

from __future__ import annotations

import atexit
import functools
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
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
from paceline.train import arguments, exchange, preparation, random_state
from paceline.train.attachment import Attachment
from paceline.train.calls.turns import Turns
from paceline.train.clock import TrainingClock
from paceline.train.data.following import Loaders
from paceline.train.evaluate import Forward, evaluate, holders
from paceline.train.leaving import limited_exit
from paceline.train.logs import statistics
from paceline.train.logs.logbook import Logbook, TrainingCounts
from paceline.train.loop_calls import LoopCalls
from paceline.train.modules.hooks import ModuleHook
from paceline.train.precision import MixedPrecision
from paceline.train.precision import check as check_precision
from paceline.train.progress import ProgressBar
from paceline.train.saving import checkpoint as checkpoints
from paceline.train.saving import persistence
from paceline.train.saving.preemption import Preempted, StopAgreement

DEFAULT_STRATEGY = "all_reduce"


class Job(LoopCalls):
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
        self._undrained = 0  # minibatches since the strategies were synchronised
        self.samples = 0
        """Samples of all ranks in those minibatches."""
        self.attachments: list[Attachment] = []
        self.turns = Turns(comm, self.attachments)
        calls: Any = {"on_batch": self._count, "on_boundary": self._boundary, "on_dropped": self._uncount}
        calls["meeting"] = functools.partial(self.turns.meeting, rests=False)
        self.loaders = Loaders(comm, seed, self.attachments, **calls)
        self.registered: dict[str, Any] = {}
        """Schedulers, scalers and whatever else `save` includes, by name."""
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
        self._num_prepared = 0
        self._of_block: list[Attachment] = []  # the models of the last `accumulate`
        self._has_prepared, self._seed = False, seed
        self._stop: StopAgreement | None = None
        is_main_thread = threading.current_thread() is threading.main_thread()
        if checkpoint is not None and meeting is not None and is_main_thread:
            self._stop = StopAgreement(meeting.store, self.rank, self.size)

    @property
    def strategy(self) -> TrainingStrategy:
        """The strategy of the model prepared last."""
        if not self.attachments:
            raise ConfigError("job.strategy: call job.prepare(model, optimizer, loader) first")
        return self.attachments[-1].strategy

    def prepare(
        self,
        *things: Any,  # what the caller gives comes back with its own types
        strategy: str | TrainingStrategy | None = None,
        accumulation_steps: int = 1,
        batch: str = "per_worker",
        shard: bool = True,
        batch_size_of: Callable[[Any], int] | None = None,
        scheduler: persistence.Stateful | Sequence[persistence.Stateful] | None = None,
        scaler: persistence.Stateful | None = None,
        precision: str | None = None,
        loss_reduction: str = "mean",
        sync_batch_norm: bool = False,
    ) -> Any:
        """Make models, optimizers and loaders ready; all ranks call it. Returns what was given, in order.

        Models and optimizers stay the same objects; a DataLoader becomes a `ShardedLoader`. An optimizer that
        is made afterwards from a model's parameters is found at its first step. The loss is a mean over the
        batch (see `loss_reduction`, `job.weight`). BatchNorm statistics stay local while training and are
        averaged over the ranks for evaluation and at the end; those of SyncBatchNorm are of all ranks'
        samples, on every fabric. Preparing a model again replaces its earlier preparation. For a model on
        the CPU, malloc of this process keeps what a step frees (`heap.keep_freed_memory`).

        Args:
            things: In any order: modules to train, on the device where they train; their optimizers;
                DataLoaders; schedulers and GradScalers, which checkpoints then hold; lists of them; None.
            strategy: A strategy string such as `"local_sgd(period=16)"`, or a strategy; default: the one that
                the model had, else all_reduce.
            accumulation_steps: Backward passes, or blocks of `accumulate`, per optimizer step, at least 1;
                default 1.
            batch: Whether the loader's batch size counts `"per_worker"` (default), or is the `"global"` one,
                which is divided over the ranks.
            shard: False where each rank's loader already gives data of its own; default True.
            batch_size_of: The number of samples of a batch, for batches that the data set makes itself and
                for `shard=False`; default: the one length that all tensors in it have. Other batches are
                checked against it.
            scheduler: A scheduler or a list of them, to be saved in checkpoints; you still step it.
            scaler: A GradScaler, to be saved in checkpoints.
            precision: `"fp32"`, or `"bf16"` or `"fp16"` for autocast, fp16 with loss scaling of its own.
            sync_batch_norm: Whether BatchNorm modules become SyncBatchNorm, in place; default False. They are
                always that if `nn.SyncBatchNorm.convert_sync_batchnorm` converted them.
            loss_reduction: Whether the loss is a `"mean"` (default; of tokens with `job.weight`), divided by
                accumulation_steps, or a `"sum"`. Methods that average models see each rank's own sum.

        Raises:
            ConfigError: Something that cannot be prepared.
            Mismatch: Ranks prepare different models, data or settings.

        Example:
            `model, optimizer, loader = job.prepare(model, optimizer, loader, strategy="diloco")`
        """
        if batch not in ("per_worker", "global"):
            raise ConfigError(f"batch={batch!r}: 'per_worker' or 'global' expected")
        dtype = check_precision(precision)
        settings = preparation.Settings(accumulation_steps, loss_reduction, sync_batch_norm)
        given = arguments.sort(things)
        preparation.check_owners(given.optimizers, [*given.models, *(a.module for a in self.attachments)])
        with self.clock.paused():
            for model in given.models:
                self._attach(model, given.optimizers_of(model), strategy, settings, dtype)
            how: Any = {"per_worker": batch == "per_worker", "divided": shard, "batch_size_of": batch_size_of}
            add = functools.partial(self.loaders.add, models=given.models, **how)
            results = [arguments.with_loaders(thing, add) for thing in things]
        named = [("scheduler", one) for one in arguments.listed(scheduler)] + [("scaler", scaler)]
        for name, one in (*given.stateful, *named):
            if one is not None:
                self.register(**{persistence.free_name(self.registered, name, one): one})
        if not self._has_prepared:  # what the ranks draw from here on is their own: dropout, augmentation
            self._has_prepared = True
            random_state.part(self._seed, self.rank)
        return results[0] if len(results) == 1 else tuple(results)

    def _attach(
        self,
        model: nn.Module,
        optimizers: Sequence[torch.optim.Optimizer],
        strategy: str | TrainingStrategy | None,
        settings: preparation.Settings,
        dtype: torch.dtype | None,
    ) -> None:
        before = next((i for i, a in enumerate(self.attachments) if a.module is model), None)
        wanted = self.options.strategy or strategy
        if before is not None:
            old = self.attachments[before]
            old.finish_minibatch()
            old.strategy.synchronize()
            old.detach()
            wanted = wanted or old.wanted
        wanted = wanted or DEFAULT_STRATEGY
        chosen = make(wanted)
        chosen.scope = str(self._num_prepared)
        index = len(self.attachments) if before is None else before
        chosen.agree = functools.partial(self.turns.await_turn, index)
        self._num_prepared += 1
        one = preparation.attach(model, optimizers, chosen, self._comm_for(model), settings)
        one.wanted = wanted
        one.on_update = self._after_update
        if one.weights.is_shared:
            one.keep(model.register_forward_pre_hook(ModuleHook(self.turns.before_forward)))
        if before is None:
            self.attachments.append(one)
        else:
            one.minibatches = self.attachments[before].minibatches
            self.attachments[before] = one
        self.loaders.welcome(one)
        if dtype is not None:
            self.register(**{f"precision{index or ''}": MixedPrecision(dtype, one)})

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
        preparation.fit(self.attachments, self.loaders, count, self.comm, self.clock)
        self.clock.start()
        for epoch in range(first, count):
            self.epoch, self._epoch_over = epoch, False
            self.loaders.epoch_begins()
            self._progress.begin(f"epoch {epoch + 1}/{count}", [*self.loaders, None][0])
            yield epoch
            self._epoch_over = True
            self._progress.end()
        self.synchronize()
        self.clock.stop()
        self.sum_up()

    def synchronize(self) -> None:
        """Drain the strategies: afterwards all ranks hold the final model, bit for bit. All ranks call it.

        Raises:
            Mismatch: Ranks that sum their gradients took different steps.
        """
        with self.clock.paused():
            for attachment in self.attachments:
                attachment.check_steps()
        for attachment in self.attachments:
            attachment.finish_minibatch()
            attachment.strategy.synchronize()
            if self.size > 1:
                shared = preparation.shared_state(attachment.replica, attachment.comm)
                preparation.average_buffers(shared, attachment.comm)
        self._undrained = 0

    def evaluate(
        self,
        model: nn.Module,
        data: Dataset[Any] | DataLoader[Any],
        metrics: Mapping[str, Any],
        *,
        batch_size: int | None = None,
        forward: Forward | None = None,
        average: bool = False,
    ) -> dict[str, Any]:
        """Measure the consensus model; all ranks call it and get the same result.

        Each sample counts once for any number of ranks, also those that a DistributedSampler gives to other
        ranks, or that drop_last drops. Training continues as if nothing had happened.

        Args:
            model: A prepared model, or any other that is the same on all ranks.
            data: A Dataset or DataLoader, prepared or not, the same on all ranks; or a loader prepared with
                `shard=False`, of which each rank evaluates its own. Batches are (inputs…, targets) unless
                `forward` says otherwise.
            metrics: Names and callables `(outputs, targets) -> (sum, count)` over a batch, which give
                Σ sum / Σ count; or torchmetrics-like objects (update, compute, reset), which see all samples
                in order.
            batch_size: Samples per forward pass of a Dataset; default 256, or the DataLoader's.
            forward: Callable `(model, batch) -> (outputs, targets)`; default: `model(*inputs)`.
            average: Evaluate the mean over the ranks of what is no prepared model, such as an EMA copy.

        Raises:
            ConfigError: `data` is empty, or a metric returns something else.
            Mismatch: `data`, or a model that was not prepared, differs over the ranks; or ranks that sum
                gradients took different steps.
        """
        attachments = holders(model, self.attachments)
        options: Any = {"batch_size": batch_size, "forward": forward, "average": average}
        with self.clock.paused(), self.turns.meeting():
            for one in attachments:
                one.check_steps()
            return evaluate(model, data, metrics, self.comm, attachments, **options)

    def save(self, path: str | os.PathLike[str], *, extra: Mapping[str, Any] | None = None) -> None:
        """Write a checkpoint; all ranks call it, after optimizer.step().

        A run that is loaded from it continues bit for bit like this one.

        Args:
            path: A folder that all ranks reach; a checkpoint that is there stays valid until this one is.
            extra: Plain values that `load` gives back.

        Raises:
            CheckpointError: On all ranks, when it cannot be written.
            ConfigError: `path` is no path, such as a `job.checkpoint` that is None.
        """
        with self.clock.paused(), self.turns.meeting(rests=False):
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
        batches, samples = self.loaders.untrained()
        step, samples = self.step - batches, self.samples - samples
        next_epoch = self.next_epoch
        in_epoch = self._epoch_over is not None and next_epoch == self.epoch
        done = self.loaders.passes_to_leave_out() if in_epoch else [0] * len(self.loaders)
        position = persistence.JobPosition(next_epoch, step, samples, self.clock.seconds, done)
        return persistence.collect(self._parts(), position, extra)

    def restore_state(self, own: dict[str, Any], first: dict[str, Any], saved_size: int) -> dict[str, Any]:
        """Continue from what `collect_state` gave; returns its `extra`. Collective, after `prepare`.

        Args:
            own: This rank's state.
            first: Rank 0's state.
            saved_size: Number of ranks at that time; with another one, only model, optimizers, registered
                objects and the position in the data are taken.
        """
        position, extra = persistence.restore(self._parts(), own, first, saved_size)
        self.step, self.samples = position.step, position.samples
        for loader, done in zip(self.loaders, position.passes_done, strict=True):
            loader.left_out = done
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
        return self.epoch + int(self._epoch_over or self.loaders.are_through())

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
        between = not any(a.waiting_backwards for a in self.attachments)
        if self._stop.must_stop(self.step, may_stop=between):
            assert self.checkpoint is not None
            self.save(self.checkpoint)
            raise Preempted(self.checkpoint, self.step, is_main=self.is_main)

    def _after_update(self) -> None:
        self.step += 1
        self._boundary()

    def barrier(self) -> None:
        """Wait until every rank is here."""
        with self.turns.meeting():
            self.comm.barrier().wait()

    def log(self, values: Mapping[str, Any] | None = None, /, **more: object) -> None:
        """Write a row with epoch, step, throughput, bytes and waiting to the log (rank 0).

        Args:
            values: Further columns: names and numbers, strings or one-element tensors.
            more: The same as keywords.
        """
        self.loaders.check_open("job.log: the job")
        self.logbook.record(self._counts(), {**(values or {}), **more})

    def unwrap(self, model: nn.Module) -> nn.Module:
        """The user's own module, without what torch.compile put around it.

        Args:
            model: A module, compiled or not.
        """
        return arguments.unwrapped(model)

    def stats(self) -> dict[str, Any]:
        """Plain values of this rank: what was trained, how long it waited, what it sent.

        `payload_bytes`, `wait_s` and `operations` cover the whole job; `training` leaves out preparation,
        evaluation and checkpoints. Payload bytes are what this rank handed to operations (see comm.ledger).
        """
        return statistics.collect(
            self.comm, self.attachments, self.clock, epoch=self.epoch, steps=self.step, samples=self.samples
        )

    def measure(self) -> dict[str, Any]:
        """The columns that every row of the log has: what happened since the row before."""
        return self.logbook.measure(self._counts())

    def sum_up(self) -> None:
        """Write one row per rank to the log; all ranks call it at the end of training."""
        self.logbook.sum_up(self.stats())

    def _counts(self) -> TrainingCounts:
        return statistics.counts(self.attachments, self.clock, self.epoch, self.step, self.samples)

    def _gather_rows(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        with self.clock.paused():
            return exchange.gather_objects(row, self.comm)

    def detach(self) -> None:
        """Take all hooks off the models; they stay as they are."""
        for attachment in self.attachments:
            attachment.detach()

    def close(self) -> None:
        """Leave the job; idempotent, also called at exit. Closes every part, whatever one raises."""
        atexit.unregister(self.close)  # or the process would keep every job that it had
        self.loaders.close()
        good = self._undrained == 0 and not hasattr(sys, "last_type")  # nor after an exception
        with limited_exit(self.meeting) as last_first:
            for comm in dict.fromkeys((self.comm, *reversed(self._comms.values()))):
                last_first.callback(comm.close, goodbye=good)
            last_first.callback(self.detach)
            last_first.callback(lambda: self.logbook.close(self.stats()))
            last_first.callback(self._stop.close if self._stop is not None else lambda: None)
            self._progress.end()

    def _count(self, own_samples: int, all_samples: int, is_last: bool) -> None:
        self._undrained += 1
        self.comm.note_progress()
        self.step += 1
        self.samples += all_samples
        self._progress.advance()

    def _uncount(self, batches: int, all_samples: int) -> None:
        """Batches of a pass that was left without training were only looked at."""
        self._undrained = max(0, self._undrained - batches)
        self.step -= batches
        self.samples -= all_samples
