"""Large messages within a host: tensors through shared memory, only the header through the socket.

The sender copies the tensors into a block of anonymous memory and names the block in the frame's header. The
block is sealed, so that it cannot shrink while a reader has it mapped, and vanishes with its last user. The
receiver opens it as /proc/PID/fd/FD, copies the tensors out and returns it; then the sender uses it again.
Blocks are reused because fresh pages cost more than the socket does.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from paceline.errors import ProtocolError

LEAST_BYTES = 256 << 10
"""Smaller messages use the socket, which is as fast for them."""
POOL_BYTES = 256 << 20
"""What one process lends at most; further messages use the socket."""
_ALIGNMENT = 64
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW


def memory_domain() -> str:
    """Equal for processes that can open each other's descriptors and share a network namespace."""
    try:
        spaces = [os.readlink(f"/proc/self/ns/{name}") for name in ("pid", "net", "user")]
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return f"unknown:{os.getpid()}:{os.urandom(4).hex()}"  # equal to no other
    return ":".join([boot, str(os.getuid()), *spaces]).replace(" ", "")


def offsets(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Offsets in a block of tensors of these `sizes` in bytes, and the bytes that the block must have."""
    found, at = [], 0
    for size in sizes:
        found.append(at)
        at += -(-size // _ALIGNMENT) * _ALIGNMENT
    return found, at


@dataclass
class _Block:
    fd: int
    memory: torch.Tensor
    """uint8, shape (bytes,)"""
    lent_to: int | None = None
    num_bytes: int = 0
    """What was lent of it."""


class Lender:
    """A process's own blocks; any thread may lend."""

    def __init__(self, pool_bytes: int = POOL_BYTES) -> None:
        self._pool_bytes = pool_bytes
        self._lock = threading.Lock()
        self._blocks: dict[int, _Block] = {}
        self._is_closed = False

    def lend(self, peer: int, tensors: Sequence[torch.Tensor]) -> int | None:
        """Copy `tensors` into a block for `peer`; returns its descriptor, or None if there is no room."""
        sizes = [t.numel() * t.element_size() for t in tensors]
        starts, total = offsets(sizes)
        block = self._find(peer, total)
        if block is None:
            return None
        for tensor, start, size in zip(tensors, starts, sizes, strict=True):
            if size:
                target = block.memory[start : start + size].view(tensor.dtype)
                target.view(tensor.shape).copy_(tensor.detach())
        return block.fd

    def take_back(self, peer: int, fd: int) -> None:
        """Use a block again: `peer` has copied what was in it."""
        with self._lock:
            block = self._blocks.get(fd)
            if block is not None and block.lent_to == peer:
                block.lent_to = None

    def lent_bytes(self, peer: int, *, but: int | None = None) -> int:
        """Bytes that `peer` has still to read, not counting the block `but`."""
        with self._lock:
            return sum(b.num_bytes for b in self._blocks.values() if b.lent_to == peer and b.fd != but)

    def is_lending(self) -> bool:
        """Whether some peer has still to read a block."""
        with self._lock:
            return any(b.lent_to is not None for b in self._blocks.values())

    def forget(self, peer: int) -> None:
        """Drop the blocks lent to `peer`, which is gone: it might still read them, so they are not reused."""
        with self._lock:
            for block in [b for b in self._blocks.values() if b.lent_to == peer]:
                os.close(self._blocks.pop(block.fd).fd)

    def close(self) -> None:
        """Free all memory; readers keep what they have mapped."""
        with self._lock:
            self._is_closed = True
            for fd in self._blocks:
                os.close(fd)
            self._blocks.clear()

    def _find(self, peer: int, num_bytes: int) -> _Block | None:
        wanted = 1 << max(num_bytes - 1, LEAST_BYTES - 1).bit_length()
        with self._lock:
            used = sum(len(b.memory) for b in self._blocks.values())
            free = [b for b in self._blocks.values() if b.lent_to is None and len(b.memory) == wanted]
            if not free and not self._is_closed and used + wanted <= self._pool_bytes:
                free = [self._make(wanted)]
            if not free:
                return None
            free[0].lent_to, free[0].num_bytes = peer, num_bytes
            return free[0]

    def _make(self, num_bytes: int) -> _Block:
        fd = os.memfd_create("paceline-messages", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, num_bytes)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
        memory = torch.frombuffer(mmap.mmap(fd, num_bytes), dtype=torch.uint8)
        self._blocks[fd] = _Block(fd, memory)
        return self._blocks[fd]


@dataclass
class Borrower:
    """A peer's blocks, as one connection has mapped them."""

    _views: dict[tuple[int, int], memoryview] = field(default_factory=dict)

    def read(self, where: object, targets: Sequence[memoryview]) -> int:
        """Copy the block `[pid, fd]` into `targets`; returns its descriptor. Raises ProtocolError."""
        if not isinstance(where, list) or len(where) != 2 or not all(_is_natural(n) for n in where):
            raise ProtocolError(f"shared block {where!r:.80} is not [pid, descriptor]")
        pid, fd = where
        view = self._views.get((pid, fd))
        if view is None:
            view = self._views[pid, fd] = self._map(pid, fd)
        starts, total = offsets([len(t) for t in targets])
        if total > len(view):
            raise ProtocolError(f"tensors of {total} bytes in a shared block of {len(view)}")
        for target, start in zip(targets, starts, strict=True):
            target[:] = view[start : start + len(target)]
        return int(fd)

    def _map(self, pid: int, fd: int) -> memoryview:
        try:
            own = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
        except OSError as error:
            raise ProtocolError(f"shared block {pid}/{fd} cannot be opened: {error.strerror}") from None
        try:
            if fcntl.fcntl(own, fcntl.F_GET_SEALS) & _SEALS != _SEALS:
                raise ProtocolError(f"shared block {pid}/{fd} could change its size")
            return memoryview(mmap.mmap(own, os.fstat(own).st_size, prot=mmap.PROT_READ))
        except (OSError, ValueError) as error:
            raise ProtocolError(f"shared block {pid}/{fd} cannot be mapped: {error}") from None
        finally:
            os.close(own)


def _is_natural(n: object) -> bool:
    return isinstance(n, int) and not isinstance(n, bool) and n >= 0
