"""Hugging Face's `Trainer` with Paceline's strategies; needs the extra `paceline[transformers]`.

    trainer = Trainer(model, args, train_dataset=data, callbacks=[PacelineCallback("local_sgd(period=8)")])
    trainer.train()                     # started by `paceline run` or torchrun

Data, precision, accumulation and checkpoints stay the Trainer's. It wraps the model in
DistributedDataParallel, which sends nothing while the callback trains. Where the Trainer evaluates or saves,
the model is the mean of the replicas; training goes on as if nothing had happened.

Without the callback, what the Trainer sends goes over the backend "paceline" after
`torch.distributed.init_process_group("paceline")` before `TrainingArguments(…)`; on GPUs also by
`TrainingArguments(ddp_backend="paceline")`, which Accelerate refuses on CPUs.
"""

from __future__ import annotations

import gc
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

from paceline.compat import embedding
from paceline.errors import ConfigError
from paceline.strategies.base.strategy import TrainingStrategy, make
from paceline.train.job import DEFAULT_STRATEGY, Job
from paceline.train.saving import checkpoint

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments


class PacelineCallback(TrainerCallback):  # type: ignore[misc]
    """Trains by a strategy of Paceline's instead of DistributedDataParallel's all-reduce.

    Args:
        strategy: A strategy string such as `"local_sgd(period=8)"`, or an object; default: all_reduce.
        fabric: What carries Paceline's tensors, `"native"` or `"torch"`; default: chosen by device.

    Raises:
        ConfigError: A wrong strategy; when training begins, a model that the Trainer has sharded (FSDP,
            DeepSpeed).

    Example:
        `Trainer(model, arguments, train_dataset=data, callbacks=[PacelineCallback("diloco(period=50)")])`
    """

    def __init__(
        self, strategy: str | TrainingStrategy = DEFAULT_STRATEGY, *, fabric: str | None = None
    ) -> None:
        if isinstance(strategy, str):
            make(strategy)
        self._strategy, self._fabric = strategy, fabric
        self._consensus = ExitStack()
        self._job: Job | None = None
        self._counter: Any = None
        """Takes the hook that counts samples off again."""

    @property
    def job(self) -> Job:
        """Paceline's handle, e.g. for `stats()`; ConfigError before training begins."""
        if self._job is None:
            raise ConfigError("PacelineCallback.job: training has not begun; call trainer.train() first")
        return self._job

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        model: nn.Module | None = None,
        optimizer: Any = None,
        **others: Any,
    ) -> None:
        """Prepare model and optimizer, and take back what a checkpoint holds of ours."""
        assert model is not None
        if self._job is not None:
            raise ConfigError(
                "this PacelineCallback was used before: give each Trainer, and each train(), its own"
            )
        self._job = job = embedding.join("the Trainer", fabric=self._fabric)
        _silence(model, job.size)
        inner = getattr(optimizer, "optimizer", optimizer)
        window = args.gradient_accumulation_steps
        job.prepare(model, inner, strategy=self._strategy, accumulation_steps=window)
        self._counter = embedding.count_samples(job, model)
        folder = _folder(args, state)
        if state.global_step and checkpoint.exists(folder, job.comm):
            job.restore_state(*checkpoint.read(folder, job.comm))
        job.clock.start()

    def on_step_begin(self, *_: Any, **others: Any) -> None:
        """The model to evaluate becomes the one to train."""
        self._consensus.close()

    on_epoch_begin = on_step_begin

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        """What the Trainer is about to evaluate or to save is the mean of the replicas."""
        self._consensus.close()
        if control.should_evaluate or control.should_save:
            self._consensus.enter_context(embedding.consensus_model(self.job))

    on_epoch_end = on_step_end

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **others: Any
    ) -> None:
        """Keep every rank's own state beside the Trainer's checkpoint."""
        self._consensus.close()
        with self.job.clock.paused():
            checkpoint.write(_folder(args, state), self.job.collect_state(), self.job.comm)

    def on_train_end(self, *_: Any, **others: Any) -> None:
        """All ranks hold the final model."""
        self._consensus.close()
        self._counter.remove()
        self.job.synchronize()
        self.job.clock.stop()
        self.job.sum_up()


def _folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(str(args.output_dir)) / f"checkpoint-{state.global_step}" / embedding.KEY


def _silence(model: nn.Module, size: int) -> None:
    """Find the DistributedDataParallel around the model, and let it send nothing.

    The Trainer does not tell its callbacks what it wrapped the model in. `no_sync()` sets the same values.
    """
    found = [
        one
        for one in gc.get_objects()
        # By type: asking some objects for their class imports modules, or warns.
        if issubclass(type(one), DistributedDataParallel) and _inside(one.module) is model
    ]
    if size > 1 and not found:
        raise ConfigError(
            "PacelineCallback: the Trainer has not wrapped the model in DistributedDataParallel: leave FSDP"
            " and DeepSpeed out of TrainingArguments, and start one process per worker by `paceline run`"
        )
    for one in found:
        one.require_backward_grad_sync = one.require_forward_param_sync = False


def _inside(module: Any) -> torch.nn.Module:
    inner: torch.nn.Module = getattr(module, "_orig_mod", module)  # torch.compile's wrapper
    return inner
