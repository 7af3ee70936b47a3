"""What all communicators of the C++ core share: operations, memory, works, priorities, errors."""

from __future__ import annotations

import abc
import atexit
import os
import time
from collections import deque
from collections.abc import Sequence
from typing import NoReturn

import torch

from paceline import _core
from paceline.comm.communicator import FabricCommunicator
from paceline.comm.ledger import Ledger
from paceline.comm.native.choice import Choice
from paceline.comm.native.codes import ANY_RANK, DTYPE_CODES, OP_CODES, REDUCIBLE
from paceline.comm.native.codes import OperationKind as Kind
from paceline.comm.native.work import DONE, FailedWork, NativeWork
from paceline.errors import CommError, ConfigError
from paceline.types import DEFAULT_OPTIONS, CallOptions, Rank, ReduceOp, Work

_core.register_tensor_types(torch.Tensor.__dlpack_c_exchange_api__, (torch.Tensor, torch.nn.Parameter))

_engine: _core.Engine | None = None
_engine_pid = 0


def engine() -> _core.Engine:
    """Return the process's one engine, started when first needed, stopped at exit."""
    global _engine, _engine_pid
    if _engine is None or _engine_pid != os.getpid():  # a forked child that is a rank itself needs its own
        _engine, _engine_pid = _core.Engine(), os.getpid()
        atexit.register(_engine.stop)
    return _engine


class NativeCommunicator(FabricCommunicator):
    """A communicator over a group of the core: one host's shared memory, a network, or both.

    Its collectives take an `algorithm` and a `priority`; see `paceline.types.CallOptions`. All ranks must
    give the same.

    Args:
        rank: This rank.
        hosts: The host of every rank.
        group: The core's group of these ranks.
        timeout_s: Deadline of an operation that names none, in seconds.
        ledger: Where bytes are counted; None: a new one.
    """

    fabric = "native"

    def __init__(
        self,
        rank: Rank,
        hosts: Sequence[str],
        group: _core.SharedMemoryGroup | _core.NetworkGroup | _core.HierarchicalGroup,
        *,
        timeout_s: float,
        ledger: Ledger | None = None,
    ) -> None:
        super().__init__(rank, len(hosts), hosts, ledger=ledger)
        self.timeout_s = timeout_s
        self.core_group = group
        """The core's group, for layers of this package that drive it themselves."""
        self._urgent: NativeCommunicator | None = None
        self._submit = group.combine
        # Tensors of operations that nobody may be waiting for any more.
        self._in_flight: deque[tuple[_core.Operation, tuple[torch.Tensor | None, ...]]] = deque()

    def allocate(self, numel: int, dtype: torch.dtype) -> torch.Tensor:
        """Zeroed 1-D tensor in shared memory, which lives until its last view is gone."""
        if numel == 0:
            return torch.zeros(0, dtype=dtype)
        self._code(dtype)
        return torch.utils.dlpack.from_dlpack(engine().allocate(numel * dtype.itemsize)).view(dtype)

    def now(self) -> float:
        """Seconds of a monotonic clock."""
        return time.perf_counter()

    def deadline_s(self, options: CallOptions) -> float:
        """Seconds that an operation with these options may take."""
        return self.timeout_s if options.timeout_s is None else options.timeout_s

    @abc.abstractmethod
    def explain(self, operation: str, num_bytes: int, *, buffers: str = "private") -> Choice:
        """Which algorithm an operation gets, and why.

        Args:
            operation: Name of a collective.
            num_bytes: Size of the buffer.
            buffers: "private", or "allocated" by `allocate`.
        """

    @abc.abstractmethod
    def make_urgent_lane(self) -> NativeCommunicator:
        """The same ranks on a queue of their own, counted in this communicator's ledger."""

    def lane(self, priority: int) -> NativeCommunicator:
        """The queue of urgent operations; made when first needed, by all ranks at the same call."""
        if self._urgent is None:
            self._urgent = self.make_urgent_lane()
        return self._urgent

    # Operations

    def start_all_reduce(
        self, tensor: torch.Tensor, op: ReduceOp, options: CallOptions = DEFAULT_OPTIONS
    ) -> Work:
        code = DTYPE_CODES.get(tensor.dtype)
        if code is None or not tensor.is_cpu or (op is not ReduceOp.SUM and not self._is_reducible(code, op)):
            self._refuse_tensor("all_reduce", tensor, op)
        pointer = tensor.data_ptr()
        try:
            operation = self._submit(
                Kind.ALL_REDUCE,
                pointer,
                pointer,
                tensor.numel(),
                code,
                OP_CODES[op],
                0,
                (),
                self.deadline_s(options),
            )
        except CommError as error:
            return self.failed(error)
        return DONE if operation is None else self.pending(operation, (tensor,))

    def start_reduce(
        self, tensor: torch.Tensor, root: Rank, op: ReduceOp, options: CallOptions = DEFAULT_OPTIONS
    ) -> Work:
        return self._combine("reduce", Kind.REDUCE, tensor, tensor, root, op, (), options=options)

    def start_reduce_scatter(
        self, output: torch.Tensor, source: torch.Tensor, op: ReduceOp, options: CallOptions = DEFAULT_OPTIONS
    ) -> Work:
        counts = (output.numel(),) * self.size
        return self._combine(
            "reduce_scatter", Kind.REDUCE_SCATTER, output, source, 0, op, counts, options=options
        )

    def start_reduce_scatter_v(
        self,
        output: torch.Tensor,
        source: torch.Tensor,
        counts: Sequence[int],
        op: ReduceOp,
        options: CallOptions = DEFAULT_OPTIONS,
    ) -> Work:
        return self._combine(
            "reduce_scatter_v", Kind.REDUCE_SCATTER, output, source, 0, op, counts, options=options
        )

    def start_broadcast(
        self, tensor: torch.Tensor, root: Rank, options: CallOptions = DEFAULT_OPTIONS
    ) -> Work:
        n = tensor.numel()
        send = (n,) if self.rank == root else ()
        receive = () if self.rank == root else self.only(root, n)
        return self._exchange(
            Kind.BROADCAST, tensor, tensor, n, root, send, receive, same=True, options=options
        )

    def start_all_gather(
        self, output: torch.Tensor, source: torch.Tensor, options: CallOptions = DEFAULT_OPTIONS
    ) -> Work:
        n = source.numel()
        return self._exchange(
            Kind.ALL_GATHER, output, source, n, 0, (n,), (n,) * self.size, same=True, options=options
        )

    def start_all_gather_v(
        self,
        output: torch.Tensor,
        source: torch.Tensor,
        counts: Sequence[int],
        options: CallOptions = DEFAULT_OPTIONS,
    ) -> Work:
        send = (source.numel(),)
        return self._exchange(
            Kind.ALL_GATHER,
            output,
            source,
            output.numel(),
            0,
            send,
            counts,
            same=True,
            options=options,
        )

    def start_gather(
        self,
        output: torch.Tensor | None,
        source: torch.Tensor,
        root: Rank,
        options: CallOptions = DEFAULT_OPTIONS,
    ) -> Work:
        n = source.numel()
        receive = (n,) * self.size if output is not None else ()
        return self._exchange(
            Kind.GATHER, output, source, n, root, self.only(root, n), receive, options=options
        )

    def start_scatter(
        self,
        output: torch.Tensor,
        source: torch.Tensor | None,
        root: Rank,
        options: CallOptions = DEFAULT_OPTIONS,
    ) -> Work:
        n = output.numel()
        send = (n,) * self.size if source is not None else ()
        return self._exchange(
            Kind.SCATTER, output, source, n, root, send, self.only(root, n), options=options
        )

    def start_all_to_all(
        self, output: torch.Tensor, source: torch.Tensor, options: CallOptions = DEFAULT_OPTIONS
    ) -> Work:
        n = source.numel() // self.size
        return self._exchange(
            Kind.ALL_TO_ALL,
            output,
            source,
            n,
            0,
            (n,) * self.size,
            (n,) * self.size,
            options=options,
        )

    def start_all_to_all_v(
        self,
        output: torch.Tensor,
        source: torch.Tensor,
        output_counts: Sequence[int],
        source_counts: Sequence[int],
        options: CallOptions = DEFAULT_OPTIONS,
    ) -> Work:
        sent, expected = source_counts[self.rank], output_counts[self.rank]
        if sent != expected:
            raise ConfigError(
                f"{self.who()}: all_to_all_v: {sent} elements sent to this rank itself, {expected} expected"
            )
        return self._exchange(
            Kind.ALL_TO_ALL, output, source, 0, 0, source_counts, output_counts, options=options
        )

    def start_barrier(self, options: CallOptions = DEFAULT_OPTIONS) -> Work:
        try:
            # Without names, which take a tenth of the call's time: source, output, numel, dtype, root, send,
            # receive and is_same_for_all.
            operation = self.core_group.exchange(
                Kind.BARRIER, 0, 0, 0, 0, 0, (), (), True, self.deadline_s(options)
            )
        except CommError as error:
            return self.failed(error)
        return DONE if operation is None else self.pending(operation, ())

    def _combine(
        self,
        name: str,
        kind: int,
        output: torch.Tensor,
        source: torch.Tensor,
        root: Rank,
        op: ReduceOp,
        counts: Sequence[int],
        *,
        options: CallOptions,
    ) -> Work:
        code = self._code(source.dtype, source)
        if not self._is_reducible(code, op):
            self._refuse_tensor(name, source, op)
        try:
            operation = self.core_group.combine(
                kind,
                source.data_ptr(),
                output.data_ptr(),
                source.numel(),
                code,
                OP_CODES[op],
                root,
                counts,
                self.deadline_s(options),
            )
        except CommError as error:
            return self.failed(error)
        return DONE if operation is None else self.pending(operation, (output, source))

    def _exchange(
        self,
        kind: int,
        output: torch.Tensor | None,
        source: torch.Tensor | None,
        numel: int,
        root: Rank,
        send: Sequence[int],
        receive: Sequence[int],
        *,
        same: bool = False,
        options: CallOptions,
    ) -> Work:
        present = output if output is not None else source
        assert present is not None
        code = self._code(present.dtype, present)
        try:
            operation = self.core_group.exchange(
                kind,
                0 if source is None else source.data_ptr(),
                0 if output is None else output.data_ptr(),
                numel,
                code,
                root,
                send,
                receive,
                same,
                self.deadline_s(options),
            )
        except CommError as error:
            return self.failed(error)
        return DONE if operation is None else self.pending(operation, (output, source))

    def only(self, rank: Rank, count: int) -> tuple[int, ...]:
        """Counts for every rank: `count` for `rank`, 0 for the others."""
        return tuple(count if r == rank else 0 for r in range(self.size))

    def start_send(
        self, tensor: torch.Tensor, dst: Rank, tag: int, options: CallOptions = DEFAULT_OPTIONS
    ) -> Work:
        code = self._code(tensor.dtype, tensor)
        try:
            operation = self.core_group.send(
                tensor.data_ptr(), tensor.numel(), code, dst, tag, self.deadline_s(options)
            )
        except CommError as error:
            return self.failed(error)
        return DONE if operation is None else self.pending(operation, (tensor,))

    def start_recv(
        self, tensor: torch.Tensor, src: Rank | None, tag: int, options: CallOptions = DEFAULT_OPTIONS
    ) -> Work:
        code = self._code(tensor.dtype, tensor)
        peer = ANY_RANK if src is None else src
        try:
            operation = self.core_group.receive(
                tensor.data_ptr(), tensor.numel(), code, peer, tag, self.deadline_s(options)
            )
        except CommError as error:
            return self.failed(error)
        return DONE if operation is None else self.pending(operation, (tensor,))

    def release(self) -> None:
        if self._urgent is not None:
            self._urgent.close()
        self.core_group.close()
        self._in_flight.clear()

    # Works and errors

    def pending(self, operation: _core.Operation, tensors: tuple[torch.Tensor | None, ...]) -> Work:
        """The Work of an operation of the core that is under way; `tensors` live until it is done."""
        flying = self._in_flight
        while flying and flying[0][0].is_done:
            flying.popleft()
        flying.append((operation, tensors))
        return NativeWork(operation, self.core_group, self.ledger, self.note_failure)

    def failed(self, error: CommError) -> Work:
        """A Work that raises `error`; no further operation can start."""
        self.unusable = str(error)
        return FailedWork(error)

    def note_failure(self, error: CommError) -> None:
        """An operation failed while it was under way: no further one can start."""
        self.unusable = self.unusable or str(error)

    @staticmethod
    def _is_reducible(code: int, op: ReduceOp) -> bool:
        return REDUCIBLE[code][OP_CODES[op]]

    def _code(self, dtype: torch.dtype, tensor: torch.Tensor | None = None) -> int:
        code = DTYPE_CODES.get(dtype)
        if code is None or (tensor is not None and not tensor.is_cpu):
            self._refuse_tensor("tensor", tensor if tensor is not None else torch.empty(0, dtype=dtype), None)
        return code

    def _refuse_tensor(self, name: str, tensor: torch.Tensor, op: ReduceOp | None) -> NoReturn:
        what = f"{tensor.dtype} on {tensor.device}"
        if op is None or not tensor.is_cpu or tensor.dtype not in DTYPE_CODES:
            raise ConfigError(
                f"{self.who()}: {name}: the native fabric moves CPU tensors of"
                f" {', '.join(str(d).removeprefix('torch.') for d in DTYPE_CODES)}; got {what}"
            )
        raise ConfigError(f"{self.who()}: {name}: {op.name} is not defined for {what}")
