# mypy: disable-error-code="override,assignment,no-any-return"
"""torch.distributed's backend "paceline": a ProcessGroup whose collectives run on the native fabric.

It subclasses `torch.distributed.ProcessGroup`, which torch takes as the group itself: DDP's C++ and the
Python API call the methods below. Shapes and options are those of torch 2.13's `ProcessGroup`; options may
be absent.
Errors are those of `paceline.errors`: PeerLost, Timeout and Mismatch name the rank; each is a RuntimeError.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import Store

from paceline.comm import communicator as base_communicator
from paceline.comm.native import communicator, network, plan, shared_memory
from paceline.comm.native import work as native_work
from paceline.comm.native.communicator import NativeCommunicator
from paceline.comm.native.work import DONE
from paceline.comm.process_group import arguments, completion, identity, instrumentation, sparse, work
from paceline.comm.process_group.arguments import Finish
from paceline.comm.process_group.identity import GroupIdentity
from paceline.comm.process_group.work import C10dWork
from paceline.errors import ConfigError

Tensors = list[torch.Tensor]


class PacelineGroup(GroupIdentity):
    """One group over one communicator; all members make the same calls in the same order."""

    def __init__(self, comm: NativeCommunicator, store: Store, *, timeout_s: float) -> None:
        super().__init__(comm, store, timeout_s=timeout_s)

    # Reductions

    def allreduce(self, tensors: Any, opts: Any = None, timeout: Any = None) -> dist.Work:
        tensor = arguments.only(tensors, "all_reduce")
        op = self._begin(opts, timeout)
        if tensor.layout is not torch.strided:
            return sparse.all_reduce(self, tensor, op)
        memory, finish = arguments.writable(tensor, "all_reduce", keep=True)
        ours, factor = arguments.operator(op, tensor)
        if factor is not None:
            memory.mul_(factor)
        return self._over(self._comm.start_all_reduce(memory, ours), [tensor], finish, opts)

    def allreduce_coalesced(self, tensors: Tensors, opts: Any = None) -> dist.Work:
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
        work = C10dWork(last._native if isinstance(last, C10dWork) else DONE, tensors, finish)
        work._watch()
        return work

    def reduce(self, tensors: Any, opts: Any = None, *rest: Any, **named: Any) -> dist.Work:
        tensor = arguments.only(tensors, "reduce")
        root = self._root(opts, rest, named)
        op = self._begin(opts, named.get("timeout"), named.get("op", rest[0] if rest else None))
        memory, finish = arguments.writable(tensor, "reduce", keep=True)
        ours, factor = arguments.operator(op, tensor)
        if factor is not None:
            memory.mul_(factor)
        return self._over(self._comm.start_reduce(memory, root, ours), [tensor], finish, opts)

    def reduce_scatter_single(
        self, output: torch.Tensor, source: torch.Tensor, opts: Any = None
    ) -> dist.Work:
        op = self._begin(opts)
        name = "reduce_scatter"
        arguments.same_dtype(name, output, source)
        self._check_share(name, "input", source.numel(), output.numel())
        memory, finish = arguments.writable(output, name)
        return self._reduce_scatter(memory, arguments.readable(source, name), op, [output], finish, opts)

    def reduce_scatter(self, outputs: Any, inputs: Any, opts: Any = None, timeout: Any = None) -> dist.Work:
        op = self._begin(opts, timeout)
        output = arguments.only(outputs, "reduce_scatter")
        sources = inputs if isinstance(inputs[0], torch.Tensor) else arguments.only(inputs, "reduce_scatter")
        self._check_list("reduce_scatter", sources)
        arguments.same_dtype("reduce_scatter", output, *sources)
        counts = [t.numel() for t in sources]
        memory, finish = arguments.writable(output, "reduce_scatter")
        flat = arguments.flat_input(sources, "reduce_scatter")
        return self._reduce_scatter(memory, flat, op, [output], finish, opts, counts)

    def reduce_scatter_single_coalesced(
        self, outputs: Tensors, inputs: Tensors, opts: Any = None
    ) -> dist.Work:
        each = [self.reduce_scatter_single(o, i, opts) for o, i in zip(outputs, inputs, strict=True)]
        return self._together(each, outputs)

    def _reduce_scatter(
        self,
        memory: torch.Tensor,
        source: torch.Tensor,
        op: Any,
        result: Tensors,
        finish: Finish | None,
        opts: Any,
        counts: list[int] | None = None,
    ) -> dist.Work:
        ours, factor = arguments.operator(op, result[0])
        if factor is not None:
            source = source * factor
        if counts is None or len(set(counts)) == 1:
            native = self._comm.start_reduce_scatter(memory, source, ours)
        else:
            native = self._comm.start_reduce_scatter_v(memory, source, counts, ours)
        return self._over(native, result, finish, opts)

    # One to all, all to one

    def broadcast(self, tensors: Any, opts: Any = None, *rest: Any, **named: Any) -> dist.Work:
        tensor = arguments.only(tensors, "broadcast")
        root = self._root(opts, rest, named)
        self._begin(opts, named.get("timeout"))
        memory, finish = arguments.writable(tensor, "broadcast", keep=root == self._comm.rank)
        return self._over(self._comm.start_broadcast(memory, root), [tensor], finish, opts)

    def gather(self, outputs: Any, inputs: Any, opts: Any = None, *rest: Any, **named: Any) -> dist.Work:
        source = arguments.only(inputs, "gather")
        root = self._root(opts, rest, named)
        self._begin(opts, named.get("timeout"))
        targets: Tensors = []
        memory, finish = None, None
        if self._comm.rank == root:
            targets = (
                outputs
                if outputs and isinstance(outputs[0], torch.Tensor)
                else arguments.only(outputs, "gather")
            )
            self._check_list("gather", targets, source.numel())
            arguments.same_dtype("gather", source, *targets)
            memory, finish = arguments.flat_output(targets, "gather")
        native = self._comm.start_gather(memory, arguments.readable(source, "gather"), root)
        return self._over(native, [targets] if targets else [], finish, opts)

    def scatter(self, outputs: Any, inputs: Any, opts: Any = None, *rest: Any, **named: Any) -> dist.Work:
        output = arguments.only(outputs, "scatter")
        root = self._root(opts, rest, named)
        self._begin(opts, named.get("timeout"))
        flat = None
        if self._comm.rank == root:
            sources = (
                inputs
                if inputs and isinstance(inputs[0], torch.Tensor)
                else arguments.only(inputs, "scatter")
            )
            self._check_list("scatter", sources, output.numel())
            arguments.same_dtype("scatter", output, *sources)
            flat = arguments.flat_input(sources, "scatter")
        memory, finish = arguments.writable(output, "scatter")
        return self._over(self._comm.start_scatter(memory, flat, root), [output], finish, opts)

    # All to all

    def all_gather_single(self, output: torch.Tensor, source: torch.Tensor, opts: Any = None) -> dist.Work:
        self._begin(opts)
        arguments.same_dtype("all_gather", output, source)
        self._check_share("all_gather", "output", output.numel(), source.numel())
        memory, finish = arguments.writable(output, "all_gather")
        native = self._comm.start_all_gather(memory, arguments.readable(source, "all_gather"))
        return self._over(native, [output], finish, opts)

    def allgather(self, outputs: Any, inputs: Any, opts: Any = None, timeout: Any = None) -> dist.Work:
        source = arguments.only(inputs, "all_gather")
        self._begin(opts, timeout)
        targets = outputs if isinstance(outputs[0], torch.Tensor) else arguments.only(outputs, "all_gather")
        self._check_list("all_gather", targets)
        arguments.same_dtype("all_gather", source, *targets)
        counts = [t.numel() for t in targets]
        memory, finish = arguments.flat_output(targets, "all_gather")
        data = arguments.readable(source, "all_gather")
        if len(set(counts)) == 1:
            self._check_share("all_gather", "output", sum(counts), source.numel())
            native = self._comm.start_all_gather(memory, data)
        else:
            native = self._comm.start_all_gather_v(memory, data, counts)
        return self._over(native, [list(targets)], finish, opts)

    def allgather_coalesced(
        self, output_lists: list[Tensors], inputs: Tensors, opts: Any = None
    ) -> dist.Work:
        each = [self.allgather([[o[i] for o in output_lists]], [t], opts) for i, t in enumerate(inputs)]
        return self._together(each, output_lists)

    def all_gather_single_coalesced(self, outputs: Tensors, inputs: Tensors, opts: Any = None) -> dist.Work:
        each = [self.all_gather_single(o, i, opts) for o, i in zip(outputs, inputs, strict=True)]
        return self._together(each, outputs)

    def all_to_all_single(
        self,
        output: torch.Tensor,
        source: torch.Tensor,
        output_splits: Sequence[int] = (),
        input_splits: Sequence[int] = (),
        opts: Any = None,
        timeout: Any = None,
    ) -> dist.Work:
        self._begin(opts, timeout)
        name = "all_to_all"
        arguments.same_dtype(name, output, source)
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
                return self._over(self._comm.start_all_to_all(memory, data), [output], finish, opts)
        received = self._split_counts(name, output, output_splits)
        sent = self._split_counts(name, source, input_splits)
        return self._over(self._comm.start_all_to_all_v(memory, data, received, sent), [output], finish, opts)

    def alltoall(self, outputs: Tensors, inputs: Tensors, opts: Any = None, timeout: Any = None) -> dist.Work:
        self._begin(opts, timeout)
        self._check_list("all_to_all", outputs)
        self._check_list("all_to_all", inputs)
        arguments.same_dtype("all_to_all", *outputs, *inputs)
        memory, finish = arguments.flat_output(outputs, "all_to_all")
        data = arguments.flat_input(inputs, "all_to_all")
        received, sent = [t.numel() for t in outputs], [t.numel() for t in inputs]
        return self._over(self._comm.start_all_to_all_v(memory, data, received, sent), outputs, finish, opts)

    # Point to point, synchronisation

    def send(self, tensors: Any, dst: int, tag: int) -> dist.Work:
        tensor = arguments.only(tensors, "send")
        self._begin(None)
        data = arguments.readable(tensor, "send")
        own = dst == self._comm.rank
        native = self._own.send(data, tag) if own else self._comm.start_send(data, dst, tag)
        return self._over(native, [tensor], is_collective=False)

    def recv(self, tensors: Any, src: int | None, tag: int) -> dist.Work:
        tensor = arguments.only(tensors, "recv")
        self._begin(None)
        memory, finish = arguments.writable(tensor, "recv")
        if src == self._comm.rank:
            native = self._own.receive(memory, tag, self._timeout_s)
        else:
            native = self._comm.start_recv(memory, src, tag)
        work = self._over(native, [tensor], finish, is_collective=False)
        work._source = -1 if src is None else src
        return work

    def recv_anysource(self, tensors: Any, tag: int) -> dist.Work:
        return self.recv(tensors, None, tag)

    def barrier(self, opts: Any = None, timeout: Any = None) -> dist.Work:
        self._begin(opts, timeout)
        return self._over(self._comm.start_barrier(), [], None, opts)

    # Older names of the same methods.
    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    alltoall_base = all_to_all_single


instrumentation.record_calls(PacelineGroup)
instrumentation.hide_from_dynamo(
    arguments,
    completion,
    identity,
    instrumentation,
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
