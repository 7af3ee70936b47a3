"""The collectives of fabrics that bring the arguments of all ranks to one place and compute there.

What an operation means is in `reference`; how a rank's call gets there, and its result back, is the fabric's.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from paceline.comm import reference
from paceline.types import DEFAULT_OPTIONS, CallOptions, Rank, ReduceOp, Work

Arguments = dict[Rank, Any]
"""What each rank gave: tensors and counts whose meaning only the operation's own function knows."""
Apply = Callable[[Arguments], None]
"""Does what a collective does to the tensors of all ranks."""


@dataclass(frozen=True, slots=True)
class ReferenceCall:
    """One rank's call of a collective."""

    name: str
    signature: tuple[object, ...]
    """What all ranks must agree on, beside the name."""
    num_bytes: int
    """Size of the full buffer of one rank."""
    apply: Apply
    source: torch.Tensor | None
    target: torch.Tensor | None
    """Where the result goes: `source` itself for an operation in place."""
    counts: Sequence[Sequence[int]] | None = None
    """Of all_to_all: elements from and to each rank."""


class ReferenceOperations(abc.ABC):
    """Every collective as a `ReferenceCall`; arguments as for `FabricOperations`."""

    size: int

    @abc.abstractmethod
    def perform(self, call: ReferenceCall) -> Work:
        """Start this rank's part of the next collective."""

    def start_all_reduce(
        self, tensor: torch.Tensor, op: ReduceOp, options: CallOptions = DEFAULT_OPTIONS
    ) -> Work:
        apply = partial(reference.all_reduce, op)
        return self._in_place("all_reduce", (*_kind(tensor), op.value), tensor, apply)

    def start_reduce(
        self, tensor: torch.Tensor, root: Rank, op: ReduceOp, options: CallOptions = DEFAULT_OPTIONS
    ) -> Work:
        apply = partial(reference.reduce, op, root)
        return self._in_place("reduce", (*_kind(tensor), root, op.value), tensor, apply)

    def start_broadcast(
        self, tensor: torch.Tensor, root: Rank, options: CallOptions = DEFAULT_OPTIONS
    ) -> Work:
        apply = partial(reference.broadcast, root)
        return self._in_place("broadcast", (*_kind(tensor), root), tensor, apply)

    def start_all_gather(
        self, output: torch.Tensor, source: torch.Tensor, options: CallOptions = DEFAULT_OPTIONS
    ) -> Work:
        return self.start_all_gather_v(output, source, [source.numel()] * self.size)

    def start_all_gather_v(
        self,
        output: torch.Tensor,
        source: torch.Tensor,
        counts: Sequence[int],
        options: CallOptions = DEFAULT_OPTIONS,
    ) -> Work:
        apply = partial(reference.gather, list(counts))
        signature = (str(source.dtype), *counts)
        return self.perform(
            ReferenceCall("all_gather", signature, output.nbytes, apply, source=source, target=output)
        )

    def start_gather(
        self,
        output: torch.Tensor | None,
        source: torch.Tensor,
        root: Rank,
        options: CallOptions = DEFAULT_OPTIONS,
    ) -> Work:
        apply = partial(reference.gather, [source.numel()] * self.size)
        signature, num_bytes = (*_kind(source), root), source.nbytes * self.size
        return self.perform(
            ReferenceCall("gather", signature, num_bytes, apply, source=source, target=output)
        )

    def start_reduce_scatter(
        self, output: torch.Tensor, source: torch.Tensor, op: ReduceOp, options: CallOptions = DEFAULT_OPTIONS
    ) -> Work:
        return self.start_reduce_scatter_v(output, source, [output.numel()] * self.size, op)

    def start_reduce_scatter_v(
        self,
        output: torch.Tensor,
        source: torch.Tensor,
        counts: Sequence[int],
        op: ReduceOp,
        options: CallOptions = DEFAULT_OPTIONS,
    ) -> Work:
        apply = partial(reference.reduce_scatter, op, list(counts))
        signature = (str(source.dtype), *counts, op.value)
        return self.perform(
            ReferenceCall("reduce_scatter", signature, source.nbytes, apply, source=source, target=output)
        )

    def start_scatter(
        self,
        output: torch.Tensor,
        source: torch.Tensor | None,
        root: Rank,
        options: CallOptions = DEFAULT_OPTIONS,
    ) -> Work:
        apply = partial(reference.scatter, root)
        signature, num_bytes = (*_kind(output), root), output.nbytes * self.size
        return self.perform(
            ReferenceCall("scatter", signature, num_bytes, apply, source=source, target=output)
        )

    def start_all_to_all(
        self, output: torch.Tensor, source: torch.Tensor, options: CallOptions = DEFAULT_OPTIONS
    ) -> Work:
        counts = [source.numel() // self.size] * self.size
        return self.start_all_to_all_v(output, source, counts, counts)

    def start_all_to_all_v(
        self,
        output: torch.Tensor,
        source: torch.Tensor,
        output_counts: Sequence[int],
        source_counts: Sequence[int],
        options: CallOptions = DEFAULT_OPTIONS,
    ) -> Work:
        counts = list(output_counts), list(source_counts)
        signature = (str(source.dtype),)
        return self.perform(
            ReferenceCall(
                "all_to_all", signature, source.nbytes, reference.all_to_all, source, output, counts
            )
        )

    def start_barrier(self, options: CallOptions = DEFAULT_OPTIONS) -> Work:
        return self.perform(ReferenceCall("barrier", (), 0, lambda arguments: None, None, None))

    def _in_place(self, name: str, signature: tuple[object, ...], tensor: torch.Tensor, apply: Apply) -> Work:
        return self.perform(
            ReferenceCall(name, signature, tensor.nbytes, apply, source=tensor, target=tensor)
        )


def argument(
    source: torch.Tensor | None,
    target: torch.Tensor | None,
    counts: Sequence[Sequence[int]] | None,
    *,
    is_in_place: bool,
) -> Any:
    """A rank's entry in the `Arguments` of an operation, in the form that `reference` expects."""
    if is_in_place:
        return source
    return (target, source) if counts is None else (target, source, *counts)


def _kind(tensor: torch.Tensor) -> tuple[int, str]:
    return tensor.numel(), str(tensor.dtype)
