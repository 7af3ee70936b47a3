# mypy: disable-error-code="override,no-any-return"
"""The calls that training makes most often, with nothing that the common case does not need.

A small operation takes a few microseconds, of which the core needs one; reading one property of a tensor
costs a tenth. Contiguous CPU tensors of the dtypes that the core knows take the short way here. Everything
else goes on to `PacelineGroup`, including profiled calls and wrong arguments.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch
import torch.distributed as dist

from paceline import _core
from paceline.comm.native.codes import DTYPE_CODES, REDUCIBLE, OperationKind
from paceline.comm.native.communicator import NativeCommunicator
from paceline.comm.native.shared_memory import SharedMemoryCommunicator
from paceline.comm.native.work import DONE
from paceline.comm.process_group import instrumentation
from paceline.comm.process_group.arguments import OPERATOR_CODES, OneList, OneTensor, Options
from paceline.comm.process_group.group import PacelineGroup
from paceline.comm.process_group.identity import UNSET_TIMEOUT
from paceline.comm.process_group.membership import NotConnected
from paceline.comm.process_group.work import FINISHED, C10dWork, Result
from paceline.errors import CommError
from paceline.torch_versions import HAS_PYTHON_BACKENDS

_profiler_enabled = torch._C._autograd._profiler_enabled  # noqa: SLF001  torch has no public name for it
_UNSET = UNSET_TIMEOUT  # a global of this module: the fast path reads it
_STRIDED = torch.strided
_code_of = DTYPE_CODES.get
_operator_of = OPERATOR_CODES.get
_BROADCAST, _ALL_GATHER = int(OperationKind.BROADCAST), int(OperationKind.ALL_GATHER)
_ALL_TO_ALL, _REDUCE_SCATTER = int(OperationKind.ALL_TO_ALL), int(OperationKind.REDUCE_SCATTER)


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether the tensor's memory can be read and written as it is."""
    return tensor.is_cpu and tensor.layout is _STRIDED and tensor.is_contiguous()


class FastPathGroup(PacelineGroup):
    """A group that takes the short way while its ranks share one host's memory."""

    def _adopt(self, comm: NativeCommunicator | NotConnected) -> None:
        super()._adopt(comm)
        self._rank, self._size = comm.rank, comm.size
        self._is_direct = isinstance(comm, SharedMemoryCommunicator)
        if isinstance(comm, SharedMemoryCommunicator):
            group = comm.shared_memory_group
            # Of each call: what returns when the operation is over, and what starts an asynchronous one.
            self._reduce = (group.all_reduce_now, group.all_reduce)
            self._combine = (group.combine_now, group.combine)
            self._exchange = (group.exchange_now, group.exchange)
            self._exchange_lists = (group.exchange_lists_now, group.exchange_lists)

    def _is_quick(self, tensors: OneTensor) -> bool:
        return (
            self._is_direct
            and len(tensors) == 1
            and self._coalesced is None
            and not self.is_hooked
            and not _profiler_enabled()
            and isinstance(tensors[0], torch.Tensor)
        )

    def _exchanged(
        self,
        kind: int,
        output: torch.Tensor,
        source: torch.Tensor,
        numel: int,
        code: int,
        send: tuple[int, ...],
        receive: tuple[int, ...],
        is_same: bool,
        opts: Options,
        root: int = 0,
    ) -> dist.Work:
        is_async = opts.asyncOp
        try:
            operation = self._exchange[is_async](
                kind,
                source.data_ptr(),
                output.data_ptr(),
                numel,
                code,
                root,
                send,
                receive,
                is_same,
                self._seconds(opts),
            )
        except CommError as error:
            return self._refused(error, [output])
        return self._started(operation, [output], (output, source), is_async)

    def _seconds(self, opts: Options) -> float:
        given = opts.timeout
        return self._timeout_s if given == _UNSET else given.total_seconds()

    def _started(
        self,
        operation: _core.Operation | None,
        result: Result,
        kept: tuple[torch.Tensor, ...],
        is_async: bool,
    ) -> dist.Work:
        """Return the work of an operation of the core; None, and a synchronous one, is over."""
        self._sequence += 1
        if not is_async:
            return FINISHED
        return C10dWork(DONE if operation is None else self._comm.pending(operation, kept), result)

    def _refused(self, error: CommError, result: Result) -> dist.Work:
        """Return the work of an operation that the core could not start."""
        self._sequence += 1
        return C10dWork(self._comm.failed(error), result)

    # `rest` and `named` hold what older forms of a call add; the methods of `PacelineGroup` know them.

    def allreduce(
        self, tensors: OneTensor, opts: Options = None, *rest: Options, **named: Options
    ) -> dist.Work:
        if opts.__class__ is dist.AllreduceOptions and not rest and not named and self._is_quick(tensors):
            tensor, operator = tensors[0], _operator_of(hash(opts.reduceOp))
            if operator is not None:
                is_async = opts.asyncOp
                try:
                    operation = self._reduce[is_async](tensor, operator, self._seconds(opts))
                except CommError as error:
                    return self._refused(error, [tensor])
                if operation is not False:
                    return self._started(operation, [tensor], (tensor,), is_async)
        return super().allreduce(tensors, opts, *rest, **named)

    def broadcast(
        self, tensors: OneTensor, opts: Options = None, *rest: Options, **named: Options
    ) -> dist.Work:
        if opts.__class__ is dist.BroadcastOptions and not rest and not named and self._is_quick(tensors):
            tensor, root = tensors[0], opts.rootRank
            code = _code_of(tensor.dtype)
            if code is not None and 0 <= root < self._size and _is_plain(tensor):
                n = tensor.numel()
                send, receive = ((n,), ()) if root == self._rank else ((), self._comm.only(root, n))
                return self._exchanged(_BROADCAST, tensor, tensor, n, code, send, receive, True, opts, root)
        return super().broadcast(tensors, opts, *rest, **named)

    def all_gather_single(
        self, output: torch.Tensor, source: torch.Tensor, opts: Options = None
    ) -> dist.Work:
        if opts is not None and self._is_quick((output,)):
            code, n, size = _code_of(output.dtype), source.numel(), self._size
            if (
                code is not None
                and source.dtype is output.dtype
                and output.numel() == n * size
                and _is_plain(output)
                and _is_plain(source)
            ):
                return self._exchanged(_ALL_GATHER, output, source, n, code, (n,), (n,) * size, True, opts)
        return super().all_gather_single(output, source, opts)

    def allgather(
        self, outputs: OneList, inputs: OneTensor, opts: Options = None, *rest: Options, **named: Options
    ) -> dist.Work:
        if opts is not None and not rest and not named and len(outputs) == 1 and self._is_quick(inputs):
            source, targets = inputs[0], outputs[0]
            code, n, dtype = _code_of(source.dtype), source.numel(), source.dtype
            if (
                code is not None
                and targets.__class__ is list
                and len(targets) == self._size
                and _is_plain(source)
                and all(t.dtype is dtype and t.numel() == n and _is_plain(t) for t in targets)
            ):
                num_bytes = n * dtype.itemsize
                is_async = opts.asyncOp
                try:
                    operation = self._exchange_lists[is_async](
                        _ALL_GATHER,
                        (source.data_ptr(),),
                        (num_bytes,),
                        [t.data_ptr() for t in targets],
                        (num_bytes,) * self._size,
                        n,
                        code,
                        True,
                        self._seconds(opts),
                    )
                except CommError as error:
                    return self._refused(error, [targets])
                return self._started(operation, [list(targets)], (source, *targets), is_async)
        return super().allgather(outputs, inputs, opts, *rest, **named)

    def alltoall(
        self,
        outputs: list[torch.Tensor],
        inputs: list[torch.Tensor],
        opts: Options = None,
        *rest: Options,
        **named: Options,
    ) -> dist.Work:
        size = self._size
        if (
            opts is not None
            and not (rest or named)
            and len(outputs) == len(inputs) == size
            and self._is_quick(inputs[:1])
        ):
            dtype, own = inputs[0].dtype, inputs[self._rank].numel()
            code = _code_of(dtype)
            if (
                code is not None
                and outputs[self._rank].numel() == own
                and all(t.dtype is dtype and _is_plain(t) for t in (*inputs, *outputs))
            ):
                is_async = opts.asyncOp
                try:
                    operation = self._exchange_lists[is_async](
                        _ALL_TO_ALL,
                        [t.data_ptr() for t in inputs],
                        [t.nbytes for t in inputs],
                        [t.data_ptr() for t in outputs],
                        [t.nbytes for t in outputs],
                        0,
                        code,
                        False,
                        self._seconds(opts),
                    )
                except CommError as error:
                    return self._refused(error, outputs)
                return self._started(operation, list(outputs), (*inputs, *outputs), is_async)
        return super().alltoall(outputs, inputs, opts, *rest, **named)

    def all_to_all_single(
        self,
        output: torch.Tensor,
        source: torch.Tensor,
        output_splits: Sequence[int] = (),
        input_splits: Sequence[int] = (),
        opts: Options = None,
        *rest: Options,
        **named: Options,
    ) -> dist.Work:
        is_even = not (output_splits or input_splits or rest or named)
        if opts is not None and is_even and self._is_quick((output,)):
            code, size, whole = _code_of(output.dtype), self._size, source.numel()
            if (
                code is not None
                and source.dtype is output.dtype
                and output.numel() == whole
                and whole
                and not source.shape[0] % size
                and not output.shape[0] % size
                and _is_plain(output)
                and _is_plain(source)
            ):
                n = whole // size
                counts = (n,) * size
                return self._exchanged(_ALL_TO_ALL, output, source, n, code, counts, counts, False, opts)
        return super().all_to_all_single(output, source, output_splits, input_splits, opts, *rest, **named)

    def reduce_scatter_single(
        self, output: torch.Tensor, source: torch.Tensor, opts: Options = None
    ) -> dist.Work:
        if opts is not None and self._is_quick((output,)):
            code, operator = _code_of(output.dtype), _operator_of(hash(opts.reduceOp))
            n = output.numel()
            if (
                code is not None
                and operator is not None
                and REDUCIBLE[code][operator]
                and source.dtype is output.dtype
                and source.numel() == n * self._size
                and _is_plain(output)
                and _is_plain(source)
            ):
                is_async = opts.asyncOp
                try:
                    operation = self._combine[is_async](
                        _REDUCE_SCATTER,
                        source.data_ptr(),
                        output.data_ptr(),
                        source.numel(),
                        code,
                        operator,
                        0,
                        (n,) * self._size,
                        self._seconds(opts),
                    )
                except CommError as error:
                    return self._refused(error, [output])
                return self._started(operation, [output], (output, source), is_async)
        return super().reduce_scatter_single(output, source, opts)

    if not HAS_PYTHON_BACKENDS:  # older names of the same methods
        _reduce_scatter_base = reduce_scatter_single
        _allgather_base = all_gather_single
        alltoall_base = all_to_all_single


instrumentation.hide_from_dynamo(sys.modules[__name__])
