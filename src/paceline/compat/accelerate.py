"""Accelerate's loop with Paceline's strategies; needs the extra `paceline[accelerate]`.

    accelerator = Accelerator()
    model, optimizer, loader = paceline.compat.accelerate.prepare(
        accelerator, model, optimizer, loader, strategy="local_sgd(period=8)")
    …                                   # accelerator.backward(loss), accumulate(model), save_state(…) as ever
    with evaluating(accelerator): …     # the model to evaluate
    accelerator.end_training()          # all ranks hold the final model

Data, precision, accumulation and checkpoints stay Accelerate's. Start it with `paceline run` or torchrun.
"""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from paceline.compat import embedding
from paceline.errors import ConfigError
from paceline.strategies.base.strategy import TrainingStrategy, make
from paceline.train.job import DEFAULT_STRATEGY, Job
from paceline.train.saving import checkpoint

if TYPE_CHECKING:
    from accelerate import Accelerator

_JOB = "paceline_job"


def prepare(
    accelerator: Accelerator,
    *objects: object,
    strategy: str | TrainingStrategy = DEFAULT_STRATEGY,
    fabric: str | None = None,
) -> Any:
    """What `accelerator.prepare(*objects)` does, with `strategy` instead of DistributedDataParallel.

    Args:
        accelerator: An `accelerate.Accelerator` that was not given to this function before.
        objects: One model, its optimizers, loaders and schedulers, in any order; returned in the same order.
        strategy: A strategy string such as `"local_sgd(period=8)"`, or an object; default: all_reduce.
        fabric: What carries Paceline's tensors, `"native"` or `"torch"`; default: chosen by device.

    Raises:
        ConfigError: No model or several, a wrong strategy, or a second call with this accelerator.
    """
    if isinstance(strategy, str):
        make(strategy)
    models = [o for o in objects if isinstance(o, nn.Module)]
    if len(models) != 1:
        raise ConfigError(f"prepare(accelerator, …): one torch.nn.Module expected, got {len(models)}")
    if hasattr(accelerator, _JOB):
        raise ConfigError("prepare(accelerator, …) was called before with this accelerator; call it once")
    job = embedding.join("Accelerate", fabric=fabric)
    setattr(accelerator, _JOB, job)
    results = [_prepared(accelerator, item) for item in objects]
    model = cast(nn.Module, results[objects.index(models[0])])
    optimizers = [item for item in objects if isinstance(item, torch.optim.Optimizer)]
    job.prepare(model, optimizers, strategy=strategy)
    model.no_sync = job.no_sync  # type: ignore[assignment]  # what accelerator.accumulate(model) asks for
    embedding.count_samples(job, model)
    _join_checkpoints(accelerator, job, model)
    job.clock.start()
    return results[0] if len(results) == 1 else tuple(results)


def job_of(accelerator: Accelerator) -> Job:
    """Paceline's handle, e.g. for `stats()`."""
    job: Job | None = getattr(accelerator, _JOB, None)
    if job is None:
        raise ConfigError("this accelerator was not prepared by paceline.compat.accelerate.prepare")
    return job


def evaluating(accelerator: Accelerator) -> AbstractContextManager[None]:
    """Inside, the model is the one to evaluate; training goes on as if nothing had happened."""
    return embedding.consensus_model(job_of(accelerator))


def _prepared(accelerator: Accelerator, item: object) -> object:
    if isinstance(item, nn.Module):
        return accelerator.prepare_model(item, evaluation_mode=True)  # everything but the DDP wrapper
    if isinstance(item, torch.optim.Optimizer):
        return accelerator.prepare_optimizer(item)
    if isinstance(item, torch.utils.data.DataLoader):
        return accelerator.prepare_data_loader(item)
    if isinstance(item, torch.optim.lr_scheduler.LRScheduler):
        return accelerator.prepare_scheduler(item)
    raise ConfigError(
        f"prepare(accelerator, …): models, optimizers, loaders and schedulers expected, got"
        f" {type(item).__name__}"
    )


def _join_checkpoints(accelerator: Accelerator, job: Job, model: nn.Module) -> None:
    """`save_state` holds the consensus model and every rank's state; `load_state` takes both back."""

    def save(models: list[nn.Module], weights: list[dict[str, Any]], folder: str) -> None:
        with embedding.consensus_model(job):
            weights[models.index(model)] = {
                # Clones: a view would be saved as shared with the whole flat buffer.
                key: value.detach().clone() if isinstance(value, torch.Tensor) else value
                for key, value in model.state_dict().items()
            }
        with job.clock.paused():
            checkpoint.write(Path(folder) / embedding.KEY, job.collect_state(), job.comm)

    def keep_out(models: list[nn.Module], folder: str) -> None:
        # Accelerate's reader refuses views of flat buffers; load_state below takes the weights back.
        models.remove(model)

    accelerator.register_save_state_pre_hook(save)
    accelerator.register_load_state_pre_hook(keep_out)
    load, end = accelerator.load_state, accelerator.end_training

    @functools.wraps(load)
    def load_state(input_dir: str | None = None, *args: object, **options: object) -> None:
        load(input_dir, *args, **options)
        folder = Path(input_dir or _latest(accelerator))
        if checkpoint.exists(folder / embedding.KEY, job.comm):
            with job.clock.paused():
                job.restore_state(*checkpoint.read(folder / embedding.KEY, job.comm))
        else:
            model.load_state_dict(_weights(folder))
            for attachment in job.attachments:
                attachment.replica.adopt()

    @functools.wraps(end)
    def end_training() -> None:
        job.synchronize()
        job.clock.stop()
        job.sum_up()
        end()

    accelerator.load_state, accelerator.end_training = load_state, end_training


def _weights(folder: Path) -> dict[str, Any]:
    """The model in a folder that Accelerate saved without us."""
    if (folder / "model.safetensors").exists():
        from safetensors.torch import load_file

        loaded: dict[str, Any] = load_file(folder / "model.safetensors")
        return loaded
    plain: dict[str, Any] = torch.load(folder / "pytorch_model.bin", weights_only=True)
    return plain


def _latest(accelerator: Accelerator) -> Path:
    """Where Accelerate itself looks without a folder: the last checkpoint of its project."""
    root = Path(accelerator.project_dir or ".") / "checkpoints"
    found = [f for f in root.glob("checkpoint_*") if f.name.rpartition("_")[2].isdigit()]
    return max(found, key=lambda f: int(f.name.rpartition("_")[2]), default=root)
