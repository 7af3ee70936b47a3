"""One model as one plain file: safetensors, or torch's format."""

from __future__ import annotations

import io
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from paceline.errors import CheckpointError, ConfigError
from paceline.train import plain
from paceline.train.attachment import Attachment
from paceline.train.data.fingerprint import check_same, digest
from paceline.train.evaluate import consensus, holders, not_prepared
from paceline.train.saving.checkpoint import write_durably
from paceline.types import Communicator

TORCH_ENDINGS = (".pt", ".pth", ".bin")


def save(
    model: nn.Module, path: str | os.PathLike[str], attachments: Sequence[Attachment], comm: Communicator
) -> None:
    """Rank 0 writes the consensus model; see `job.save_model`.

    Args:
        model: The plain module.
        path: The file, or a folder.
        attachments: The job's prepared models.
        comm: The ranks; all call this.
    """
    if not isinstance(path, (str, os.PathLike)) or not os.fspath(path):
        raise ConfigError(
            f"job.save_model(model, {path!r}): a path expected, such as 'out/model.safetensors'"
        )
    target = _target(Path(path))
    if target.suffix == ".safetensors":
        _check_tensors(model)
    held = holders(model, attachments)
    if comm.size > 1:
        _check_others(model, held, comm)
    failure = ""
    with torch.no_grad(), consensus(held, comm):
        if comm.rank == 0:
            try:
                target.parent.mkdir(parents=True, exist_ok=True)
                write_durably(target, _encoded(model, target))
            except Exception as error:  # whatever it was, the other ranks must hear of it
                failure = f"{type(error).__name__}: {error}"
    failure = plain.broadcast(failure, comm)
    if failure:
        raise CheckpointError(
            f"rank {comm.rank}: {target} was not written by rank 0: {failure}. A file that was there before"
            " is kept. Is there room on the disk, and may rank 0 write there?"
        )


def _target(path: Path) -> Path:
    """The file; ConfigError, on all ranks alike, for what cannot be written at all."""
    if not path.suffix:
        path = path / "model.safetensors"
    if path.suffix in TORCH_ENDINGS:
        return path
    if path.suffix != ".safetensors":
        raise ConfigError(
            f"job.save_model({str(path)!r}): .safetensors or one of {', '.join(TORCH_ENDINGS)} expected, got"
            f" {path.suffix!r}"
        )
    try:
        import safetensors.torch  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"job.save_model({str(path)!r}): the package safetensors is not installed here ({error}):"
            " pip install safetensors, or save to a path that ends in .pt"
        ) from error
    return path


def _check_tensors(model: nn.Module) -> None:
    """ConfigError, on all ranks alike, for what safetensors cannot hold."""
    import safetensors.torch

    for name, value in model.state_dict().items():
        kind = str(value.dtype) if isinstance(value, torch.Tensor) else type(value).__name__
        try:
            safetensors.torch.save({name: value.new_empty(0)})
        except (KeyError, AttributeError, ValueError) as error:
            raise ConfigError(
                f"job.save_model: {name} is {kind}, which safetensors cannot hold: use a path ending in .pt"
            ) from error


def _check_others(model: nn.Module, held: Sequence[Attachment], comm: Communicator) -> None:
    """What is of no prepared model must be equal on all ranks: rank 0's is written."""
    check_same(
        f"save_model: {type(model).__name__}, which is no prepared model, or a part of it,",
        digest([list(one) for one in not_prepared(model, held)], whole=True),
        comm,
        "Save a prepared model, or make the ranks' copies equal first; job.register(name=copy) puts each"
        " rank's own into checkpoints",
    )


def _encoded(model: nn.Module, target: Path) -> bytes | memoryview:
    # Clones: the parameters are views, and a view would be saved with the whole flat buffer.
    if target.suffix in TORCH_ENDINGS:
        kept: dict[tuple[Any, ...], torch.Tensor] = {}
        state = {}
        for name, value in model.state_dict().items():
            is_tensor = isinstance(value, torch.Tensor)
            state[name] = kept.setdefault(_memory(name, value), value.clone()) if is_tensor else value
        file = io.BytesIO()
        torch.save(state, file)
        return file.getbuffer()
    import safetensors.torch

    tensors: dict[str, torch.Tensor] = {}
    first: dict[tuple[Any, ...], str] = {}
    notes = {"format": "pt"}
    for name, value in model.state_dict().items():
        kept_name = first.setdefault(_memory(name, value), name)
        if kept_name == name:
            tensors[name] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
        else:
            notes[name] = kept_name  # tied: as safetensors itself notes it
    return bytes(safetensors.torch.save(tensors, metadata=notes))


def _memory(name: str, value: torch.Tensor) -> tuple[Any, ...]:
    """Equal for tied weights: the same elements of the same memory."""
    if not value.numel():
        return (name,)
    return (value.data_ptr(), value.dtype, tuple(value.shape), value.stride(), value.device)
