"""The user's handle on a distributed training job."""

from __future__ import annotations

import atexit
import os
import random
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from paceline import registry
from paceline.comm.communicator import FabricCommunicator
from paceline.comm.rendezvous import Meeting, meet
from paceline.errors import ConfigError
from paceline.options import JobOptions
from paceline.strategies.strategy import TrainingStrategy, make
from paceline.train import preparation
from paceline.train.attachment import Attachment
from paceline.train.data import ShardedLoader, shard
from paceline.train.logbook import Logbook, default_folder
from paceline.train.progress import ProgressBar

DEFAULT_FABRIC = "torch"
DEFAULT_STRATEGY = "all_reduce"


def init(
    *,
    fabric: str | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool = True,
    seed: int | None = None,
    log_dir: str | os.PathLike[str] | None = None,
    timeout_s: float = 600.0,
    host: str | None = None,
) -> Job:
    """Join the job that this process was started for, or be a job of one.

    Works under `paceline run`, torchrun, mpirun, srun, and alone; what the command line says wins over these
    arguments. `checkpoint` is where SIGTERM saves and where `epochs` resumes. `seed` seeds torch, NumPy and
    `random` (rank 0 with `seed` itself, the others differently) and the order of the data. `timeout_s` bounds
    the wait for other ranks; `host` overrides this rank's host identity.
    """
    options = JobOptions.from_environment(os.environ)
    meeting = meet(secret=options.secret, host=host, timeout_s=timeout_s)
    if seed is not None:
        own_seed = (seed + meeting.rank * 1_000_003) % 2**32
        torch.manual_seed(own_seed)
        np.random.seed(own_seed)
        random.seed(own_seed)
    name = options.fabric or fabric or DEFAULT_FABRIC
    module = registry.load("paceline.comm", name, kind="fabric")
    comm = module.connect(meeting, timeout_s=timeout_s)
    path = options.checkpoint or (str(checkpoint) if checkpoint is not None else None)
    job = Job(
        comm,
        options,
        meeting=meeting,
        checkpoint=path,
        progress=progress and options.progress,
        seed=seed,
        log_dir=log_dir,
    )
    atexit.register(job.close)
    return job


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
        log_dir: str | os.PathLike[str] | None = None,
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
        self.samples = 0
        """Samples of all ranks in those minibatches."""
        self.attachments: list[Attachment] = []
        self.loaders: list[ShardedLoader] = []
        self._seed = seed
        self._progress = ProgressBar(enabled=progress and self.is_main)
        self._logbook = Logbook(Path(log_dir) if log_dir is not None else default_folder())
        self._training_since: float | None = None
        self._training_s = 0.0
        self._untimed: dict[str, float] = {"payload_bytes": 0, "wait_s": 0.0}

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
    ) -> Any:
        """Make model, optimizer(s) and loader(s) ready; returns what was given, in the same order.

        `others`: an optimizer or a list of them, then a DataLoader or a list of them; each may be left out.
        The model and the optimizers are the same objects afterwards; a loader becomes a `ShardedLoader`.
        `strategy` is a spec such as "local_sgd(period=16)"; default all_reduce. The loss must be a mean over
        the batch. `accumulation_steps`: backward passes per optimizer step. `batch`: whether the loader's
        batch size counts "per_worker" or is the "global" one, divided over the ranks. `shard=False`: each
        rank's loader already gives its own data. Preparing a model again replaces its earlier preparation.
        Raises ConfigError for what cannot be prepared, Mismatch when ranks prepare different things.
        """
        if batch not in ("per_worker", "global"):
            raise ConfigError(f"batch={batch!r}: 'per_worker' or 'global' expected")
        optimizers = [o for item in others for o in _listed(item) if isinstance(o, torch.optim.Optimizer)]
        inner = self.unwrap(model)
        chosen = make(self.options.strategy or strategy or DEFAULT_STRATEGY)
        with self._off_the_clock():
            for old in [a for a in self.attachments if a.replica.module is inner]:
                old.strategy.synchronize()
                old.detach()
                self.attachments.remove(old)
            attachment = preparation.attach(
                inner, optimizers, chosen, self.comm, accumulation_steps=accumulation_steps
            )
            self.attachments.append(attachment)
            results = [self._prepared(item, batch=batch, divided=shard) for item in others]
        return (model, *results) if results else model

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
        first = self.epoch
        self._clock_on()
        for epoch in range(first, count):
            self.epoch = epoch
            total = None
            try:
                total = len(self.loaders[0]) if self.loaders else None  # type: ignore[arg-type]
            except TypeError:
                pass
            self._progress.begin(f"epoch {epoch + 1}/{count}", total)
            yield epoch
            self._progress.end()
        self.synchronize()
        self._clock_off()

    def synchronize(self) -> None:
        """Drain the strategies: afterwards all ranks hold the final model, bit for bit. All ranks call it."""
        for attachment in self.attachments:
            attachment.finish_minibatch()
            attachment.strategy.synchronize()
            if self.size > 1:
                preparation.average_buffers(attachment.replica.buffers(), self.comm)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes inside only accumulate gradients; the next one outside sends their sum."""
        with ExitStack() as stack:
            for attachment in self.attachments:
                stack.enter_context(attachment.no_sync())
            yield

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.comm.barrier().wait()

    def print(self, *values: Any, **keywords: Any) -> None:
        """`print` on rank 0 only."""
        if self.is_main:
            self._progress.print(*values, **keywords)

    def log(self, values: Mapping[str, Any] | None = None, /, **more: Any) -> None:
        """Append a row to log.csv and log.jsonl (rank 0), with epoch, step and seconds of training."""
        if self.is_main:
            head = {"epoch": self.epoch, "step": self.step, "seconds": round(self.training_s, 6)}
            self._logbook.write({**head, **(values or {}), **more})

    def unwrap(self, model: nn.Module) -> nn.Module:
        """The user's own module, without what torch.compile put around it."""
        inner: nn.Module = getattr(model, "_orig_mod", model)
        return inner

    @property
    def training_s(self) -> float:
        """Seconds inside `epochs`, without evaluation, saving and loading."""
        running = 0.0 if self._training_since is None else time.perf_counter() - self._training_since
        return self._training_s + running

    def stats(self) -> dict[str, Any]:
        """Plain values of this rank: what was trained, how long it waited, what it sent.

        `payload_bytes`, `wait_s` and `operations` cover the whole job; `training` leaves out preparation,
        evaluation and checkpoints. Payload bytes are what this rank handed to operations (see comm.ledger);
        `wire_bytes` is None where the fabric cannot see them.
        """
        total = self.comm.ledger.snapshot()
        return {
            "rank": self.rank,
            "size": self.size,
            "fabric": self.comm.fabric,
            "strategy": _name(self.attachments[-1].strategy) if self.attachments else None,
            "epoch": self.epoch,
            "steps": self.step,
            "samples": self.samples,
            "seconds": self.training_s,
            "minibatches": sum(a.minibatches for a in self.attachments),
            "model_bytes": sum(a.replica.model_bytes for a in self.attachments),
            **total,
            "training": {
                "payload_bytes": total["payload_bytes"] - int(self._untimed["payload_bytes"]),
                "wait_s": total["wait_s"] - self._untimed["wait_s"],
            },
        }

    def close(self) -> None:
        """Leave the job; idempotent, also called at exit."""
        self._progress.end()
        for attachment in self.attachments:
            attachment.detach()
        self.comm.close()

    def _count(self, own_samples: int, all_samples: int, is_last: bool) -> None:
        self.step += 1
        self.samples += all_samples
        self._progress.advance()

    def _clock_on(self) -> None:
        if self._training_since is None:
            self._training_since = time.perf_counter()

    def _clock_off(self) -> None:
        self._training_s = self.training_s
        self._training_since = None

    @contextmanager
    def _off_the_clock(self) -> Iterator[None]:
        """Time and bytes inside do not count as training."""
        running, ledger = self._training_since is not None, self.comm.ledger
        self._clock_off()
        sent, waited = ledger.payload_bytes, ledger.wait_s
        try:
            yield
        finally:
            self._untimed["payload_bytes"] += ledger.payload_bytes - sent
            self._untimed["wait_s"] += ledger.wait_s - waited
            if running:
                self._clock_on()


def _listed(item: Any) -> list[Any]:
    return list(item) if isinstance(item, (list, tuple)) else [item]


def _name(strategy: TrainingStrategy) -> str:
    return type(strategy).__module__.rsplit(".", 1)[-1]
