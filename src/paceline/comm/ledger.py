"""The byte ledger: what one rank handed to its communicator, by operation, and how long it waited.

Payload bytes of an operation are the bytes that *this rank hands to it*, whatever the algorithm then sends:

    all_reduce, reduce                       the tensor
    broadcast                                the tensor on the root, 0 elsewhere
    all_gather(_v), gather                   the source
    reduce_scatter(_v), all_to_all(_v)       the source
    scatter                                  the source on the root, 0 elsewhere
    send, call, post, answer                 the tensors sent (answer: by a handler); recv counts 0
    barrier                                  0

So bytes are counted once in the job, where they come from. Wire bytes are what really left this rank through
its links, headers included; None where the fabric cannot see them (torch).
"""

from __future__ import annotations

from typing import Any, Protocol

OPERATIONS = (
    "all_reduce",
    "reduce",
    "broadcast",
    "all_gather",
    "all_gather_v",
    "reduce_scatter",
    "reduce_scatter_v",
    "gather",
    "scatter",
    "all_to_all",
    "all_to_all_v",
    "barrier",
    "send",
    "recv",
    "call",
    "post",
    "answer",
)


class Counts(Protocol):
    """Calls and payload bytes of one operation, wherever they are kept: the core counts some by itself."""

    calls: int
    payload_bytes: int


class OperationCounts:
    """Counts of one operation, kept here."""

    __slots__ = ("calls", "payload_bytes")

    def __init__(self) -> None:
        self.calls = 0
        self.payload_bytes = 0


class Counters:
    """The counts of every operation, one attribute each: they are touched on every call."""

    __slots__ = OPERATIONS

    all_reduce: Counts
    reduce: Counts
    broadcast: Counts
    all_gather: Counts
    all_gather_v: Counts
    reduce_scatter: Counts
    reduce_scatter_v: Counts
    gather: Counts
    scatter: Counts
    all_to_all: Counts
    all_to_all_v: Counts
    barrier: Counts
    send: Counts
    recv: Counts
    call: Counts
    post: Counts
    answer: Counts

    def __init__(self) -> None:
        self.all_reduce = OperationCounts()
        self.reduce = OperationCounts()
        self.broadcast = OperationCounts()
        self.all_gather = OperationCounts()
        self.all_gather_v = OperationCounts()
        self.reduce_scatter = OperationCounts()
        self.reduce_scatter_v = OperationCounts()
        self.gather = OperationCounts()
        self.scatter = OperationCounts()
        self.all_to_all = OperationCounts()
        self.all_to_all_v = OperationCounts()
        self.barrier = OperationCounts()
        self.send = OperationCounts()
        self.recv = OperationCounts()
        self.call = OperationCounts()
        self.post = OperationCounts()
        self.answer = OperationCounts()


class Ledger:
    """One communicator's counts."""

    def __init__(self) -> None:
        self.counters = Counters()
        self.wait_s = 0.0
        """Seconds that callers spent inside `Work.wait` (and `Reply.wait`), on the fabric's clock."""
        self.wire_bytes: int | None = None

    @property
    def operations(self) -> dict[str, Counts]:
        """The counts by name of the operation."""
        return {name: getattr(self.counters, name) for name in OPERATIONS}

    @property
    def payload_bytes(self) -> int:
        """Sum over all operations."""
        return sum(counts.payload_bytes for counts in self.operations.values())

    def snapshot(self) -> dict[str, Any]:
        """Plain values: `payload_bytes`, `wire_bytes`, `wait_s`, and `operations` that were called."""
        return {
            "payload_bytes": self.payload_bytes,
            "wire_bytes": self.wire_bytes,
            "wait_s": self.wait_s,
            "operations": {
                name: {"calls": c.calls, "payload_bytes": c.payload_bytes}
                for name, c in self.operations.items()
                if c.calls
            },
        }
