"""What communicators of the C++ core have in common: memory, works, errors, messages between two ranks."""

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
from paceline.comm.native_codes import ANY_RANK, DTYPE_CODES, OP_CODES, REDUCIBLE
from paceline.comm.native_work import DONE, FailedWork, NativeWork
from paceline.errors import CommError, ConfigError
from paceline.types import Rank, ReduceOp, Work

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
        group: _core.Group | _core.NetworkGroup,
        *,
        timeout_s: float,
    ) -> None:
        super().__init__(rank, len(hosts), hosts)
        self.timeout_s = timeout_s
        self._core_group = group
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

    def _send(self, tensor: torch.Tensor, dst: Rank, tag: int) -> Work:
        code = self._code(tensor.dtype, tensor)
        try:
            operation = self._core_group.send(
                tensor.data_ptr(), tensor.numel(), code, dst, tag, self.timeout_s
            )
        except CommError as error:
            return self._failed(error)
        return DONE if operation is None else self._pending(operation, (tensor,))

    def _recv(self, tensor: torch.Tensor, src: Rank | None, tag: int) -> Work:
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
