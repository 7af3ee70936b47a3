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

Payloads of different operations do not compare: an all_reduce of S bytes sends nearly 2S, and a rank's
messages to itself send nothing. `scheduled_bytes` do: what the schedule with the fewest bytes sends,
on any fabric.
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


def scheduled_share(operation: str, size: int) -> float:
    """Bytes sent to other ranks per payload byte, by the schedule of an operation that sends the fewest.

    What a root alone hands in (broadcast, scatter) is counted there, so this is right for the sum over ranks.

    Args:
        operation: One of `OPERATIONS`.
        size: Number of ranks, P: 2(P − 1)/P for all_reduce, P − 1 for all_gather and broadcast, (P − 1)/P for
            the other collectives, 1 for messages.
    """
    if operation in ("send", "call", "post", "answer"):
        return 1.0
    if operation in ("broadcast", "all_gather", "all_gather_v"):
        return size - 1.0
    return (2.0 if operation == "all_reduce" else 1.0) * (size - 1) / size


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
        self.own_bytes = 0
        """Payload bytes of messages of this rank to itself, answers included."""

    @property
    def operations(self) -> dict[str, Counts]:
        """The counts by name of the operation."""
        return {name: getattr(self.counters, name) for name in OPERATIONS}

    @property
    def payload_bytes(self) -> int:
        """Sum over all operations."""
        return sum(counts.payload_bytes for counts in self.operations.values())

    def scheduled_bytes(self, size: int) -> float:
        """Bytes that this rank had to send to others, by the schedules that send the fewest.

        Args:
            size: Number of ranks of the communicator.
        """
        counts = self.operations
        return sum(scheduled_share(n, size) * c.payload_bytes for n, c in counts.items()) - self.own_bytes

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
