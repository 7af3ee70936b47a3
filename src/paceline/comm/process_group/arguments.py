"""What the arguments of a c10d call mean to a Communicator: operators, tensors that must be packed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from paceline.comm.native.codes import DTYPE_CODES, OP_CODES
from paceline.errors import ConfigError
from paceline.types import ReduceOp

Finish = Callable[[], None]

# By the number of torch's RedOpType, which is the hash of a torch ReduceOp.
_OPERATORS: dict[int, ReduceOp] = {
    hash(theirs): ours
    for theirs, ours in (
        (dist.ReduceOp.SUM, ReduceOp.SUM),
        (dist.ReduceOp.AVG, ReduceOp.MEAN),
        (dist.ReduceOp.PRODUCT, ReduceOp.PRODUCT),
        (dist.ReduceOp.MIN, ReduceOp.MIN),
        (dist.ReduceOp.MAX, ReduceOp.MAX),
        (dist.ReduceOp.BAND, ReduceOp.BAND),
        (dist.ReduceOp.BOR, ReduceOp.BOR),
        (dist.ReduceOp.BXOR, ReduceOp.BXOR),
        (dist.ReduceOp.PREMUL_SUM, ReduceOp.SUM),
    )
}
_PREMUL_SUM = hash(dist.ReduceOp.PREMUL_SUM)
OPERATOR_CODES = {code: OP_CODES[ours] for code, ours in _OPERATORS.items() if code != _PREMUL_SUM}
"""By the hash of a torch ReduceOp: the core's number of those that need nothing else."""
_BITWISE = (ReduceOp.BAND, ReduceOp.BOR, ReduceOp.BXOR)
# Moved, not combined: any dtype travels as integers of its size.
_CARRIERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class NoReduction(ConfigError, RuntimeError):
    """An operator and a dtype that do not go together: other backends call this a RuntimeError."""


def operator(theirs: Any, tensor: torch.Tensor) -> tuple[ReduceOp, float | torch.Tensor | None]:
    """Return our operator, and the factor of PREMUL_SUM. NoReduction if the pair has no meaning."""
    code = hash(theirs)
    op = _OPERATORS.get(code)
    if op is None:
        raise NoReduction(f"paceline backend: ReduceOp {theirs} is not supported")
    if op in _BITWISE and (tensor.is_floating_point() or tensor.is_complex()):
        raise NoReduction(f"Cannot use ReduceOp.{op.name} with non-integral dtype {tensor.dtype}")
    if tensor.is_complex() and op in (ReduceOp.MIN, ReduceOp.MAX):
        raise NoReduction(
            f"ReduceOp.{op.name} has no meaning for {tensor.dtype}: complex numbers have no order"
        )
    if tensor.dtype not in DTYPE_CODES:
        raise NoReduction(f"paceline backend: {tensor.dtype} cannot be reduced; convert it first")
    if op is ReduceOp.MEAN and tensor.dtype == torch.bool:
        raise NoReduction("ReduceOp.AVG has no meaning for torch.bool; use BOR or BAND")
    return op, theirs.__getstate__()[1] if code == _PREMUL_SUM else None


def only(tensors: Any, name: str) -> Any:
    """Return the single entry of a list that c10d passes for historical reasons."""
    if isinstance(tensors, torch.Tensor):
        return tensors
    if len(tensors) != 1:
        raise ConfigError(f"paceline backend: {name}: one tensor per rank expected, got {len(tensors)}")
    return tensors[0]


class Elsewhere(ConfigError):
    """A tensor on a device that this backend does not reach; another backend of the group may."""

    def __init__(self, text: str, device: torch.device) -> None:
        super().__init__(text)
        self.device = device


def check_cpu(tensor: torch.Tensor, name: str) -> None:
    """Raise a ConfigError for tensors this backend cannot reach."""
    if not tensor.is_cpu or tensor.layout is not torch.strided:
        raise Elsewhere(
            f"paceline backend: {name}: a dense CPU tensor expected, got {tensor.layout} on {tensor.device};"
            " NCCL takes CUDA tensors where torch has it, other devices need a group of their own backend",
            tensor.device,
        )


def carrier(tensor: torch.Tensor) -> torch.Tensor:
    """Return the contiguous tensor itself, or a view of it with a dtype that the core moves."""
    if tensor.dtype in DTYPE_CODES:
        return tensor
    return tensor.view(-1).view(_CARRIERS.get(tensor.dtype.itemsize, torch.uint8))


def readable(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """Contiguous values of an input."""
    check_cpu(tensor, name)
    return carrier(tensor if tensor.is_contiguous() else tensor.contiguous())


def writable(tensor: torch.Tensor, name: str, *, keep: bool = False) -> tuple[torch.Tensor, Finish | None]:
    """Contiguous memory for an output, with what copies it back; `keep` when the values are input as well."""
    check_cpu(tensor, name)
    if tensor.is_contiguous():
        return carrier(tensor), None
    dense = tensor.contiguous() if keep else torch.empty(tensor.shape, dtype=tensor.dtype)
    return carrier(dense), lambda: _copy(tensor, dense)


def _copy(to: torch.Tensor, source: torch.Tensor) -> None:
    with torch.no_grad():
        to.copy_(source)


def joined(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Return one 1-D tensor over all of them if they follow each other in memory."""
    first = tensors[0]
    at, storage = first.data_ptr(), first.untyped_storage().data_ptr()
    for t in tensors:
        if t.data_ptr() != at or not t.is_contiguous() or t.dtype != first.dtype:
            return None
        if t.untyped_storage().data_ptr() != storage:
            return None
        at += t.nbytes
    return torch.as_strided(first.detach(), (sum(t.numel() for t in tensors),), (1,))


def flat_input(tensors: Sequence[torch.Tensor], name: str) -> torch.Tensor:
    """Return the values of a list of inputs, one after the other."""
    for t in tensors:
        check_cpu(t, name)
    whole = joined(tensors)
    if whole is None:
        whole = torch.cat([t.detach().reshape(-1) for t in tensors])
    return carrier(whole)


def flat_output(tensors: Sequence[torch.Tensor], name: str) -> tuple[torch.Tensor, Finish | None]:
    """Return memory for a list of outputs, with what copies it to them if it is not theirs."""
    for t in tensors:
        check_cpu(t, name)
    whole = joined(tensors)
    if whole is not None:
        return carrier(whole), None
    whole = torch.empty(sum(t.numel() for t in tensors), dtype=tensors[0].dtype)

    def finish() -> None:
        with torch.no_grad():
            for t, part in zip(tensors, torch.split(whole, [t.numel() for t in tensors]), strict=True):
                t.copy_(part.view(t.shape))

    return carrier(whole), finish


def same_dtype(name: str, *tensors: torch.Tensor) -> None:
    """Raise a ConfigError unless all tensors have one dtype."""
    dtypes = {t.dtype for t in tensors}
    if len(dtypes) > 1:
        raise ConfigError(
            f"paceline backend: {name}: tensors must have one dtype, got {sorted(map(str, dtypes))}"
        )
