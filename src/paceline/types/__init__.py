"""The seams: small value types, and the protocols that layers meet at.

A layer names only what it receives; implementations live in `comm` (Communicator) and `train` (Replica).
torch is imported for annotations only, so `paceline schedule …` stays light.
"""

from paceline.types.communicator import Communicator, Ledger, Meeting, Store
from paceline.types.training import Batch, Bucket, Replica
from paceline.types.values import (
    DEFAULT_OPTIONS,
    CallOptions,
    Handler,
    Message,
    Rank,
    ReduceOp,
    Reply,
    Work,
    named,
)

__all__ = [
    "DEFAULT_OPTIONS",
    "Batch",
    "Bucket",
    "CallOptions",
    "Communicator",
    "Handler",
    "Ledger",
    "Meeting",
    "Message",
    "Rank",
    "ReduceOp",
    "Replica",
    "Reply",
    "Store",
    "Work",
    "named",
]
