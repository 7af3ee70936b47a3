"""What communicators of the C++ core have in common: operations, memory, works, errors."""

from __future__ import annotations

import atexit
import os
import time
from collections import deque
from collections.abc import Sequence
from typing import NoReturn

import torch

from paceline import _core
from paceline.comm.communicator import FabricCommunicator
from paceline.comm.native.codes import ANY_RANK, DTYPE_CODES, OP_CODES, REDUCIBLE, Kind
from paceline.comm.native.work import DONE, FailedWork, NativeWork
from paceline.errors import CommError, ConfigError
from paceline.types import Rank, ReduceOp, Work

_core.know_tensors(torch.Tensor.__dlpack_c_exchange_api__, (torch.Tensor, torch.nn.Parameter))

_engine: _core.Engine | None = None
_engine_pid = 0


def engine() -> _core.Engine:
    """Return the process's one engine, started when first needed, stopped at exit."""
    global _engine, _engine_pid
    if _engine is None or _engine_pid != os.getpid():  # a forked child that is a rank itself needs its own
        _engine, _engine_pid = _core.Engine(), os.getpid()
        atexit.register(_engine.stop)
    return _engine


class CoreCommunicator(FabricCommunicator):
    """A communicator over a group of the core: one host's shared memory, or a network."""

    fabric = "native"

    def __init__(
        self,
        rank: Rank,
        hosts: Sequence[str],
        group: _core.Group | _core.NetworkGroup | _core.MixedGroup,
        *,
        timeout_s: float,
    ) -> None:
        super().__init__(rank, len(hosts), hosts)
        self.timeout_s = timeout_s
        self._core_group = group
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

    # Operations

    def start_all_reduce(self, tensor: torch.Tensor, op: ReduceOp) -> Work:
        code = DTYPE_CODES.get(tensor.dtype)
        if code is None or not tensor.is_cpu or (op is not ReduceOp.SUM and not self._is_reducible(code, op)):
            self._refuse_tensor("all_reduce", tensor, op)
        pointer = tensor.data_ptr()
        try:
            operation = self._submit(
                Kind.ALL_REDUCE, pointer, pointer, tensor.numel(), code, OP_CODES[op], 0, (), self.timeout_s
            )
        except CommError as error:
            return self._failed(error)
        return DONE if operation is None else self._pending(operation, (tensor,))

    def start_reduce(self, tensor: torch.Tensor, root: Rank, op: ReduceOp) -> Work:
        return self._combine("reduce", Kind.REDUCE, tensor, tensor, root, op, ())

    def start_reduce_scatter(self, output: torch.Tensor, source: torch.Tensor, op: ReduceOp) -> Work:
        counts = (output.numel(),) * self.size
        return self._combine("reduce_scatter", Kind.REDUCE_SCATTER, output, source, 0, op, counts)

    def start_reduce_scatter_v(
        self, output: torch.Tensor, source: torch.Tensor, counts: Sequence[int], op: ReduceOp
    ) -> Work:
        return self._combine("reduce_scatter_v", Kind.REDUCE_SCATTER, output, source, 0, op, counts)

    def start_broadcast(self, tensor: torch.Tensor, root: Rank) -> Work:
        n = tensor.numel()
        send = (n,) if self.rank == root else ()
        receive = () if self.rank == root else self._only(root, n)
        return self._exchange(Kind.BROADCAST, tensor, tensor, n, root, send, receive, same=True)

    def start_all_gather(self, output: torch.Tensor, source: torch.Tensor) -> Work:
        n = source.numel()
        return self._exchange(Kind.ALL_GATHER, output, source, n, 0, (n,), (n,) * self.size, same=True)

    def start_all_gather_v(self, output: torch.Tensor, source: torch.Tensor, counts: Sequence[int]) -> Work:
        send = (source.numel(),)
        return self._exchange(Kind.ALL_GATHER, output, source, output.numel(), 0, send, counts, same=True)

    def start_gather(self, output: torch.Tensor | None, source: torch.Tensor, root: Rank) -> Work:
        n = source.numel()
        receive = (n,) * self.size if output is not None else ()
        return self._exchange(Kind.GATHER, output, source, n, root, self._only(root, n), receive)

    def start_scatter(self, output: torch.Tensor, source: torch.Tensor | None, root: Rank) -> Work:
        n = output.numel()
        send = (n,) * self.size if source is not None else ()
        return self._exchange(Kind.SCATTER, output, source, n, root, send, self._only(root, n))

    def start_all_to_all(self, output: torch.Tensor, source: torch.Tensor) -> Work:
        n = source.numel() // self.size
        return self._exchange(Kind.ALL_TO_ALL, output, source, n, 0, (n,) * self.size, (n,) * self.size)

    def start_all_to_all_v(
        self,
        output: torch.Tensor,
        source: torch.Tensor,
        output_counts: Sequence[int],
        source_counts: Sequence[int],
    ) -> Work:
        sent, expected = source_counts[self.rank], output_counts[self.rank]
        if sent != expected:
            raise ConfigError(
                f"{self._who()}: all_to_all_v: {sent} elements sent to this rank itself, {expected} expected"
            )
        return self._exchange(Kind.ALL_TO_ALL, output, source, 0, 0, source_counts, output_counts)

    def start_barrier(self) -> Work:
        try:
            operation = self._core_group.exchange(Kind.BARRIER, 0, 0, 0, 0, 0, (), (), True, self.timeout_s)
        except CommError as error:
            return self._failed(error)
        return DONE if operation is None else self._pending(operation, ())

    def _combine(
        self,
        name: str,
        kind: int,
        output: torch.Tensor,
        source: torch.Tensor,
        root: Rank,
        op: ReduceOp,
        counts: Sequence[int],
    ) -> Work:
        code = self._code(source.dtype, source)
        if not self._is_reducible(code, op):
            self._refuse_tensor(name, source, op)
        try:
            operation = self._core_group.combine(
                kind,
                source.data_ptr(),
                output.data_ptr(),
                source.numel(),
                code,
                OP_CODES[op],
                root,
                counts,
                self.timeout_s,
            )
        except CommError as error:
            return self._failed(error)
        return DONE if operation is None else self._pending(operation, (output, source))

    def _exchange(
        self,
        kind: int,
        output: torch.Tensor | None,
        source: torch.Tensor | None,
        numel: int,
        root: Rank,
        send: Sequence[int],
        receive: Sequence[int],
        same: bool = False,
    ) -> Work:
        present = output if output is not None else source
        assert present is not None
        code = self._code(present.dtype, present)
        try:
            operation = self._core_group.exchange(
                kind,
                0 if source is None else source.data_ptr(),
                0 if output is None else output.data_ptr(),
                numel,
                code,
                root,
                send,
                receive,
                same,
                self.timeout_s,
            )
        except CommError as error:
            return self._failed(error)
        return DONE if operation is None else self._pending(operation, (output, source))

    def _only(self, rank: Rank, count: int) -> tuple[int, ...]:
        return tuple(count if r == rank else 0 for r in range(self.size))

    def start_send(self, tensor: torch.Tensor, dst: Rank, tag: int) -> Work:
        code = self._code(tensor.dtype, tensor)
        try:
            operation = self._core_group.send(
                tensor.data_ptr(), tensor.numel(), code, dst, tag, self.timeout_s
            )
        except CommError as error:
            return self._failed(error)
        return DONE if operation is None else self._pending(operation, (tensor,))

    def start_recv(self, tensor: torch.Tensor, src: Rank | None, tag: int) -> Work:
        code = self._code(tensor.dtype, tensor)
        peer = ANY_RANK if src is None else src
        try:
            operation = self._core_group.receive(
                tensor.data_ptr(), tensor.numel(), code, peer, tag, self.timeout_s
            )
        except CommError as error:
            return self._failed(error)
        return DONE if operation is None else self._pending(operation, (tensor,))

    def _close(self) -> None:
        self._core_group.close()
        self._in_flight.clear()

    # Works and errors

    def _pending(self, operation: _core.Operation, tensors: tuple[torch.Tensor | None, ...]) -> Work:
        flying = self._in_flight
        while flying and flying[0][0].is_done:
            flying.popleft()
        flying.append((operation, tensors))
        return NativeWork(self, operation)

    def _failed(self, error: CommError) -> Work:
        self.unusable = str(error)
        return FailedWork(error)

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
                f"{self._who()}: {name}: the native fabric moves CPU tensors of"
                f" {', '.join(str(d).removeprefix('torch.') for d in DTYPE_CODES)}; got {what}"
            )
        raise ConfigError(f"{self._who()}: {name}: {op.name} is not defined for {what}")
