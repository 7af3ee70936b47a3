"""The interface that a fabric implements: every operation, started on arguments that are valid.

`FabricCommunicator` checks the arguments of its public methods, counts them in the byte ledger and then calls
the methods below. Other layers of this package that check for themselves (the torch.distributed backend) call
them directly: nothing here is checked or counted.

Common to all: tensors are contiguous, of one dtype and device; a rank starts the same operations in the same
order as all others; nothing blocks beyond the hand-over, and tensors must not be touched until the returned
Work is done. `options` holds what the call asks for beside its arguments; a fabric without algorithms or
priorities is given none.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence

import torch

from paceline.types import DEFAULT_OPTIONS, CallOptions, Rank, ReduceOp, Work


class FabricOperations(abc.ABC):
    """The operations of P ranks; shapes count elements, whatever the tensors' dimensions."""

    @abc.abstractmethod
    def start_all_reduce(
        self, tensor: torch.Tensor, op: ReduceOp, options: CallOptions = DEFAULT_OPTIONS
    ) -> Work:
        """Replace `tensor` [n] on every rank by the reduction over ranks, in place."""

    @abc.abstractmethod
    def start_reduce(
        self, tensor: torch.Tensor, root: Rank, op: ReduceOp, options: CallOptions = DEFAULT_OPTIONS
    ) -> Work:
        """Replace `tensor` [n] on `root` by the reduction; elsewhere it is unspecified afterwards."""

    @abc.abstractmethod
    def start_broadcast(
        self, tensor: torch.Tensor, root: Rank, options: CallOptions = DEFAULT_OPTIONS
    ) -> Work:
        """Replace `tensor` [n] on every rank by that of `root`."""

    @abc.abstractmethod
    def start_all_gather(
        self, output: torch.Tensor, source: torch.Tensor, options: CallOptions = DEFAULT_OPTIONS
    ) -> Work:
        """`output` [P·n] becomes every rank's `source` [n], in rank order. They do not overlap."""

    @abc.abstractmethod
    def start_all_gather_v(
        self,
        output: torch.Tensor,
        source: torch.Tensor,
        counts: Sequence[int],
        options: CallOptions = DEFAULT_OPTIONS,
    ) -> Work:
        """As `start_all_gather`, with `counts[r]` elements from rank r."""

    @abc.abstractmethod
    def start_reduce_scatter(
        self,
        output: torch.Tensor,
        source: torch.Tensor,
        op: ReduceOp,
        options: CallOptions = DEFAULT_OPTIONS,
    ) -> Work:
        """`output` [n] becomes this rank's share of the reduction of `source` [P·n]."""

    @abc.abstractmethod
    def start_reduce_scatter_v(
        self,
        output: torch.Tensor,
        source: torch.Tensor,
        counts: Sequence[int],
        op: ReduceOp,
        options: CallOptions = DEFAULT_OPTIONS,
    ) -> Work:
        """As `start_reduce_scatter`, with `counts[r]` elements for rank r."""

    @abc.abstractmethod
    def start_gather(
        self,
        output: torch.Tensor | None,
        source: torch.Tensor,
        root: Rank,
        options: CallOptions = DEFAULT_OPTIONS,
    ) -> Work:
        """On `root`, `output` [P·n] becomes every rank's `source` [n]; None on other ranks."""

    @abc.abstractmethod
    def start_scatter(
        self,
        output: torch.Tensor,
        source: torch.Tensor | None,
        root: Rank,
        options: CallOptions = DEFAULT_OPTIONS,
    ) -> Work:
        """`output` [n] becomes this rank's share of the `source` [P·n] of `root`; None on other ranks."""

    @abc.abstractmethod
    def start_all_to_all(
        self, output: torch.Tensor, source: torch.Tensor, options: CallOptions = DEFAULT_OPTIONS
    ) -> Work:
        """Share r of `source` [P·n] goes to rank r; `output` [P·n] holds what every rank sent here."""

    @abc.abstractmethod
    def start_all_to_all_v(
        self,
        output: torch.Tensor,
        source: torch.Tensor,
        output_counts: Sequence[int],
        source_counts: Sequence[int],
        options: CallOptions = DEFAULT_OPTIONS,
    ) -> Work:
        """As `start_all_to_all`, with `source_counts[r]` elements to and `output_counts[r]` from rank r."""

    @abc.abstractmethod
    def start_barrier(self, options: CallOptions = DEFAULT_OPTIONS) -> Work:
        """Done when every rank has started it."""

    @abc.abstractmethod
    def start_send(
        self, tensor: torch.Tensor, dst: Rank, tag: int, options: CallOptions = DEFAULT_OPTIONS
    ) -> Work:
        """Send `tensor` to rank `dst`; matches the receive there with the same tag, in order."""

    @abc.abstractmethod
    def start_recv(
        self, tensor: torch.Tensor, src: Rank | None, tag: int, options: CallOptions = DEFAULT_OPTIONS
    ) -> Work:
        """Receive into `tensor` from rank `src`, or with None from the first rank that sends this tag."""
