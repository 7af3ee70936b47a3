# mypy: disable-error-code="override,assignment"
"""torch.distributed's backend "paceline": a ProcessGroup whose collectives run on the native fabric.

It subclasses `torch.distributed.ProcessGroup`, which torch takes as the group itself: DDP's C++ and the
Python API call the methods below. Signatures and options are those of torch 2.13's `ProcessGroup`; options
may be absent. Errors are those of `paceline.errors`: PeerLost, Timeout and Mismatch name the rank; each is a
RuntimeError.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from datetime import timedelta

import torch
import torch.distributed as dist

from paceline.comm import communicator as base_communicator
from paceline.comm.native import communicator, network, plan, shared_memory
from paceline.comm.native import work as native_work
from paceline.comm.native.work import DONE
from paceline.comm.process_group import (
    arguments,
    completion,
    hooks,
    identity,
    instrumentation,
    membership,
    sparse,
    work,
)
from paceline.comm.process_group.arguments import OneList, OneTensor, Options
from paceline.comm.process_group.identity import GroupIdentity
from paceline.comm.process_group.work import C10dWork
from paceline.errors import ConfigError
from paceline.torch_versions import HAS_PYTHON_BACKENDS
from paceline.types import ReduceOp

Tensors = list[torch.Tensor]


class PacelineGroup(GroupIdentity):
    """One group over one communicator; all members make the same calls in the same order.

    Every method takes torch's arguments apart, starts the operation and wraps its work; see `GroupIdentity`
    for the arguments of the class.
    """

    # Reductions

    def allreduce(
        self, tensors: OneTensor, opts: Options = None, timeout: timedelta | None = None
    ) -> dist.Work:
        tensor = arguments.only(tensors, "all_reduce")
        op, options = arguments.reduce_op(opts), self._options(opts, timeout)
        if tensor.layout is not torch.strided:
            total = sparse.all_reduce(self._comm, tensor, op, options)
            self._sequence += 1
            return C10dWork(DONE, [total])
        memory, finish = arguments.writable(tensor, "all_reduce", keep=True)
        ours, factor = arguments.operator(op, tensor)
        if factor is not None:
            memory.mul_(factor)
        return self._work(self._comm.start_all_reduce(memory, ours, options), [tensor], finish, opts)

    def allreduce_coalesced(self, tensors: Tensors, opts: Options = None) -> dist.Work:
        filled = [t.data_ptr() for t in tensors if t.layout is torch.strided and t.numel()]
        if len(set(filled)) == len(filled):
            return self._together([self.allreduce([t], opts) for t in tensors], tensors)
        # The same tensor several times: each entry is the reduction of what it held before the call.
        copies = [t.clone() for t in tensors]
        works = [self.allreduce([c], opts) for c in copies]

        def finish() -> None:
            for work, tensor, copy in zip(works, tensors, copies, strict=True):
                work.wait()
                with torch.no_grad():
                    tensor.copy_(copy)

        last = works[-1]
        work = C10dWork(last.native if isinstance(last, C10dWork) else DONE, tensors, finish)
        work.watch()
        return work

    def reduce(
        self,
        tensors: OneTensor,
        opts: Options = None,
        op: dist.ReduceOp | None = None,
        timeout: timedelta | None = None,
        *,
        root: int | None = None,
    ) -> dist.Work:
        tensor = arguments.only(tensors, "reduce")
        root, options = self._root(opts, root), self._options(opts, timeout)
        memory, finish = arguments.writable(tensor, "reduce", keep=True)
        ours, factor = arguments.operator(arguments.reduce_op(opts, op), tensor)
        if factor is not None:
            memory.mul_(factor)
        return self._work(self._comm.start_reduce(memory, root, ours, options), [tensor], finish, opts)

    def reduce_scatter_single(
        self, output: torch.Tensor, source: torch.Tensor, opts: Options = None
    ) -> dist.Work:
        name = "reduce_scatter"
        arguments.same_dtype(name, [output, source])
        self._check_share(name, "input", source.numel(), output.numel())
        memory, finish = arguments.writable(output, name)
        ours, data = _reduced(arguments.readable(source, name), opts, output)
        native = self._comm.start_reduce_scatter(memory, data, ours, self._options(opts))
        return self._work(native, [output], finish, opts)

    def reduce_scatter(
        self, outputs: OneTensor, inputs: OneList, opts: Options = None, timeout: timedelta | None = None
    ) -> dist.Work:
        name = "reduce_scatter"
        output = arguments.only(outputs, name)
        sources = arguments.only_list(inputs, name)
        self._check_list(name, sources)
        arguments.same_dtype(name, [output, *sources])
        counts = [t.numel() for t in sources]
        memory, finish = arguments.writable(output, name)
        ours, data = _reduced(arguments.flat_input(sources, name), opts, output)
        options = self._options(opts, timeout)
        if len(set(counts)) == 1:
            native = self._comm.start_reduce_scatter(memory, data, ours, options)
        else:
            native = self._comm.start_reduce_scatter_v(memory, data, counts, ours, options)
        return self._work(native, [output], finish, opts)

    def reduce_scatter_single_coalesced(
        self, outputs: Tensors, inputs: Tensors, opts: Options = None
    ) -> dist.Work:
        each = [self.reduce_scatter_single(o, i, opts) for o, i in zip(outputs, inputs, strict=True)]
        return self._together(each, outputs)

    # One to all, all to one

    def broadcast(
        self,
        tensors: OneTensor,
        opts: Options = None,
        timeout: timedelta | None = None,
        *,
        root: int | None = None,
    ) -> dist.Work:
        tensor = arguments.only(tensors, "broadcast")
        root, options = self._root(opts, root), self._options(opts, timeout)
        memory, finish = arguments.writable(tensor, "broadcast", keep=root == self._comm.rank)
        return self._work(self._comm.start_broadcast(memory, root, options), [tensor], finish, opts)

    def gather(
        self,
        outputs: OneList,
        inputs: OneTensor,
        opts: Options = None,
        timeout: timedelta | None = None,
        *,
        root: int | None = None,
    ) -> dist.Work:
        source = arguments.only(inputs, "gather")
        root, options = self._root(opts, root), self._options(opts, timeout)
        memory, finish, result = None, None, []
        if self._comm.rank == root:
            targets = arguments.only_list(outputs, "gather")
            self._check_list("gather", targets, source.numel())
            arguments.same_dtype("gather", [source, *targets])
            memory, finish = arguments.flat_output(targets, "gather")
            result = [list(targets)]
        data = arguments.readable(source, "gather")
        return self._work(self._comm.start_gather(memory, data, root, options), result, finish, opts)

    def scatter(
        self,
        outputs: OneTensor,
        inputs: OneList,
        opts: Options = None,
        timeout: timedelta | None = None,
        *,
        root: int | None = None,
    ) -> dist.Work:
        output = arguments.only(outputs, "scatter")
        root, options = self._root(opts, root), self._options(opts, timeout)
        flat = None
        if self._comm.rank == root:
            sources = arguments.only_list(inputs, "scatter")
            self._check_list("scatter", sources, output.numel())
            arguments.same_dtype("scatter", [output, *sources])
            flat = arguments.flat_input(sources, "scatter")
        memory, finish = arguments.writable(output, "scatter")
        return self._work(self._comm.start_scatter(memory, flat, root, options), [output], finish, opts)

    # All to all

    def all_gather_single(
        self, output: torch.Tensor, source: torch.Tensor, opts: Options = None
    ) -> dist.Work:
        arguments.same_dtype("all_gather", [output, source])
        self._check_share("all_gather", "output", output.numel(), source.numel())
        memory, finish = arguments.writable(output, "all_gather")
        data = arguments.readable(source, "all_gather")
        native = self._comm.start_all_gather(memory, data, self._options(opts))
        return self._work(native, [output], finish, opts)

    def allgather(
        self, outputs: OneList, inputs: OneTensor, opts: Options = None, timeout: timedelta | None = None
    ) -> dist.Work:
        source = arguments.only(inputs, "all_gather")
        targets = arguments.only_list(outputs, "all_gather")
        options = self._options(opts, timeout)
        self._check_list("all_gather", targets)
        arguments.same_dtype("all_gather", [source, *targets])
        counts = [t.numel() for t in targets]
        memory, finish = arguments.flat_output(targets, "all_gather")
        data = arguments.readable(source, "all_gather")
        if len(set(counts)) == 1:
            self._check_share("all_gather", "output", sum(counts), source.numel())
            native = self._comm.start_all_gather(memory, data, options)
        else:
            native = self._comm.start_all_gather_v(memory, data, counts, options)
        return self._work(native, [list(targets)], finish, opts)

    def allgather_coalesced(
        self, output_lists: list[Tensors], inputs: Tensors, opts: Options = None
    ) -> dist.Work:
        each = [self.allgather([[o[i] for o in output_lists]], [t], opts) for i, t in enumerate(inputs)]
        return self._together(each, output_lists)

    def all_gather_single_coalesced(
        self, outputs: Tensors, inputs: Tensors, opts: Options = None
    ) -> dist.Work:
        each = [self.all_gather_single(o, i, opts) for o, i in zip(outputs, inputs, strict=True)]
        return self._together(each, outputs)

    def all_to_all_single(
        self,
        output: torch.Tensor,
        source: torch.Tensor,
        output_splits: Sequence[int] = (),
        input_splits: Sequence[int] = (),
        opts: Options = None,
        timeout: timedelta | None = None,
    ) -> dist.Work:
        name, options = "all_to_all", self._options(opts, timeout)
        arguments.same_dtype(name, [output, source])
        if not (output.is_contiguous() and source.is_contiguous()):
            raise ConfigError(f"paceline backend: {name}: Tensors must be contiguous")  # as for gloo and NCCL
        memory, finish = arguments.writable(output, name)
        data = arguments.readable(source, name)
        if not output_splits and not input_splits:
            for which, t in (("input", source), ("output", output)):
                if t.dim() and t.shape[0] % self._comm.size:
                    raise ConfigError(
                        f"Tensor's dim 0 does not divide equally across group size ({name} {which})"
                    )
            if output.numel() == source.numel():
                native = self._comm.start_all_to_all(memory, data, options)
                return self._work(native, [output], finish, opts)
        received = self._split_counts(name, output, output_splits)
        sent = self._split_counts(name, source, input_splits)
        native = self._comm.start_all_to_all_v(memory, data, received, sent, options)
        return self._work(native, [output], finish, opts)

    def alltoall(
        self, outputs: Tensors, inputs: Tensors, opts: Options = None, timeout: timedelta | None = None
    ) -> dist.Work:
        name, options = "all_to_all", self._options(opts, timeout)
        self._check_list(name, outputs)
        self._check_list(name, inputs)
        arguments.same_dtype(name, [*outputs, *inputs])
        memory, finish = arguments.flat_output(outputs, name)
        data = arguments.flat_input(inputs, name)
        received, sent = [t.numel() for t in outputs], [t.numel() for t in inputs]
        native = self._comm.start_all_to_all_v(memory, data, received, sent, options)
        return self._work(native, outputs, finish, opts)

    # Point to point, synchronisation

    def send(self, tensors: OneTensor, dst: int, tag: int) -> dist.Work:
        tensor = arguments.only(tensors, "send")
        data = arguments.readable(tensor, "send")
        if dst == self._comm.rank:
            native = self._to_self.send(data, tag)
        else:
            native = self._comm.start_send(data, dst, tag, self._default_options)
        return self._kept(C10dWork(native, [tensor]))

    def recv(self, tensors: OneTensor, src: int | None, tag: int) -> dist.Work:
        tensor = arguments.only(tensors, "recv")
        memory, finish = arguments.writable(tensor, "recv")
        if src == self._comm.rank:
            native = self._to_self.receive(memory, tag, self._timeout_s)
        else:
            native = self._comm.start_recv(memory, src, tag, self._default_options)
        return self._kept(C10dWork(native, [tensor], finish, source=-1 if src is None else src))

    def recv_anysource(self, tensors: OneTensor, tag: int) -> dist.Work:
        return self.recv(tensors, None, tag)

    def barrier(self, opts: Options = None, timeout: timedelta | None = None) -> dist.Work:
        return self._work(self._comm.start_barrier(self._options(opts, timeout)), [], None, opts)

    # Older names of the same methods. From 2.14 on torch has them itself, and takes one that a subclass
    # defines for an operation of its own.
    if not HAS_PYTHON_BACKENDS:
        _reduce_scatter_base = reduce_scatter_single
        reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
        _allgather_base = all_gather_single
        allgather_into_tensor_coalesced = all_gather_single_coalesced
        alltoall_base = all_to_all_single


def _reduced(data: torch.Tensor, opts: Options, output: torch.Tensor) -> tuple[ReduceOp, torch.Tensor]:
    """Return our operator for `opts`, and the input multiplied by the factor that it may have."""
    ours, factor = arguments.operator(arguments.reduce_op(opts), output)
    return ours, data if factor is None else data * factor


instrumentation.record_calls(PacelineGroup)
instrumentation.hide_from_dynamo(
    arguments,
    completion,
    hooks,
    identity,
    instrumentation,
    membership,
    sparse,
    work,
    base_communicator,
    shared_memory,
    communicator,
    network,
    plan,
    native_work,
)
instrumentation.hide_from_dynamo(sys.modules[__name__])
