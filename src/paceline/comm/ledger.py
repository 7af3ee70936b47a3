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
    """What an operation's counts look like, also where the core keeps them."""

    calls: int
    payload_bytes: int


class Entry:
    """Counts of one operation."""

    __slots__ = ("calls", "payload_bytes")

    def __init__(self) -> None:
        self.calls = 0
        self.payload_bytes = 0


class Ledger:
    """One communicator's counts. Plain increments: it is touched on every call."""

    def __init__(self) -> None:
        self.operations: dict[str, Counts] = {name: Entry() for name in OPERATIONS}
        self.wait_s = 0.0
        """Seconds that callers spent inside `Work.wait` (and `Reply.wait`), on the fabric's clock."""
        self.wire_bytes: int | None = None

    @property
    def payload_bytes(self) -> int:
        """Sum over all operations."""
        return sum(entry.payload_bytes for entry in self.operations.values())

    def snapshot(self) -> dict[str, Any]:
        """Plain values: `payload_bytes`, `wire_bytes`, `wait_s`, and `operations` that were called."""
        return {
            "payload_bytes": self.payload_bytes,
            "wire_bytes": self.wire_bytes,
            "wait_s": self.wait_s,
            "operations": {
                name: {"calls": e.calls, "payload_bytes": e.payload_bytes}
                for name, e in self.operations.items()
                if e.calls
            },
        }
