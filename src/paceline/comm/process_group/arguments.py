"""Translates the arguments of a c10d call to those of a Communicator: operators, and tensors to be packed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist

from paceline.comm.native.codes import DTYPE_CODES, OP_CODES
from paceline.errors import ConfigError
from paceline.types import ReduceOp

Finish = Callable[[], None]
"""Copies received bytes to where they belong."""
OneTensor = torch.Tensor | Sequence[torch.Tensor]
"""A tensor, or a list with nothing else in it."""
OneList = Sequence[torch.Tensor] | Sequence[Sequence[torch.Tensor]]
"""A list of tensors, or a list with nothing but such a list in it."""
Options = Any
"""What c10d passes after the tensors: one of torch's option objects, which share no base class, or None; in
older forms of a call the operator or the root."""
Operator = dist.ReduceOp | dist.ReduceOp.RedOpType
"""Torch's operator."""

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
    """An operator that is not defined for a dtype. Other backends raise RuntimeError."""


def operator(theirs: Operator, tensor: torch.Tensor) -> tuple[ReduceOp, float | torch.Tensor | None]:
    """Return our operator, and the factor of PREMUL_SUM.

    Raises NoReduction if it is not defined for the dtype.
    """
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
    if code != _PREMUL_SUM:
        return op, None
    state: Any = theirs.__getstate__()  # a pair; torch's stubs do not have this method
    return op, state[1]


def reduce_op(opts: Options, op: Operator | None = None) -> Operator:
    """Return torch's operator of a call: `op` if given, else that of its options, else SUM."""
    if isinstance(opts, (dist.ReduceOp, dist.ReduceOp.RedOpType)):
        return opts
    if op is not None:
        return op
    found: Operator = getattr(opts, "reduceOp", dist.ReduceOp.SUM)
    return found


def only(tensors: OneTensor, name: str) -> torch.Tensor:
    """Return the single entry of a list that c10d passes for historical reasons."""
    if isinstance(tensors, torch.Tensor):
        return tensors
    _check_single(tensors, name)
    return tensors[0]


def only_list(tensors: OneList, name: str) -> Sequence[torch.Tensor]:
    """Return the list of tensors itself, or the single entry of a list of lists."""
    if tensors and isinstance(tensors[0], torch.Tensor):
        return tensors  # type: ignore[return-value]
    _check_single(tensors, name)
    return tensors[0]  # type: ignore[return-value]


def _check_single(entries: Sequence[object], name: str) -> None:
    if len(entries) != 1:
        raise ConfigError(f"paceline backend: {name}: one tensor per rank expected, got {len(entries)}")


class Elsewhere(ConfigError):
    """A tensor on a device that this backend does not serve; another backend of the group may."""

    def __init__(self, text: str, device: torch.device) -> None:
        super().__init__(text)
        self.device = device


def check_cpu(tensor: torch.Tensor, name: str) -> None:
    """Raise Elsewhere, a ConfigError, for a tensor that is not dense and on the CPU."""
    if not tensor.is_cpu or tensor.layout is not torch.strided:
        raise Elsewhere(
            f"paceline backend: {name}: a dense CPU tensor expected, got {tensor.layout} on {tensor.device};"
            " NCCL takes CUDA tensors where torch has it, other devices need a group of their own backend",
            tensor.device,
        )


def carrier(tensor: torch.Tensor) -> torch.Tensor:
    """Return the contiguous tensor itself, or a view of it with a dtype that the core knows."""
    if tensor.dtype in DTYPE_CODES:
        return tensor
    return tensor.view(-1).view(_CARRIERS.get(tensor.dtype.itemsize, torch.uint8))


def readable(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """Return the values of an input in contiguous memory."""
    check_cpu(tensor, name)
    return carrier(tensor if tensor.is_contiguous() else tensor.contiguous())


def writable(tensor: torch.Tensor, name: str, *, keep: bool = False) -> tuple[torch.Tensor, Finish | None]:
    """Return contiguous memory for an output, and what copies it back.

    `keep`: the values of `tensor` are input as well.
    """
    check_cpu(tensor, name)
    if tensor.is_contiguous():
        return carrier(tensor), None
    dense = tensor.contiguous() if keep else torch.empty(tensor.shape, dtype=tensor.dtype)
    return carrier(dense), lambda: _copy(tensor, dense)


def _copy(to: torch.Tensor, source: torch.Tensor) -> None:
    with torch.no_grad():
        to.copy_(source)


def joined(tensors: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """Return one 1-D tensor over all of them if they follow each other in memory, else None."""
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
    """Return contiguous memory for a list of outputs, and what copies it to them unless it is theirs."""
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


def same_dtype(name: str, tensors: Sequence[torch.Tensor]) -> None:
    """Raise a ConfigError unless all tensors have one dtype."""
    dtypes = {t.dtype for t in tensors}
    if len(dtypes) > 1:
        raise ConfigError(
            f"paceline backend: {name}: tensors must have one dtype, got {sorted(map(str, dtypes))}"
        )
