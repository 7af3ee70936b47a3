"""Reduction operations and the exceptions that Horovod's public interface names."""

from __future__ import annotations

from paceline.errors import PacelineError
from paceline.types import ReduceOp


class HorovodInternalError(PacelineError, RuntimeError):
    """A collective failed; an elastic job restores its last commit and goes on."""


class HostsUpdatedInterrupt(PacelineError, RuntimeError):
    """Workers joined or left; an elastic job synchronises and goes on without losing work."""

    def __init__(self, skip_sync: bool = False) -> None:
        super().__init__("the set of workers changed")
        self.skip_sync = skip_sync


class Operation:
    """A reduction by its Horovod name; comparable and printable."""

    def __init__(self, name: str, reduce_op: ReduceOp | None) -> None:
        self.name, self.reduce_op = name, reduce_op

    def __repr__(self) -> str:
        return f"<horovod operation {self.name}>"


Average = Operation("Average", ReduceOp.SUM)
Sum = Operation("Sum", ReduceOp.SUM)
Adasum = Operation("Adasum", None)
Min = Operation("Min", ReduceOp.MIN)
Max = Operation("Max", ReduceOp.MAX)
Product = Operation("Product", ReduceOp.PRODUCT)

BY_NAME = {o.name: o for o in (Average, Sum, Adasum, Min, Max, Product)}


def choose(op: Operation | None, average: bool | None) -> Operation:
    """Return the operation from the current `op` and the old `average` argument; both given is an error."""
    if op is not None and average is not None:
        raise ValueError("the op parameter supersedes average; give one of them")
    if op is not None:
        if not isinstance(op, Operation):
            raise ValueError(f"op must be one of hvd.{', hvd.'.join(BY_NAME)}; got {op!r}")
        return op
    return Sum if average is False else Average
