"""The seams: small value types, and the protocols that layers meet at.

A layer names only what it receives; implementations live in `comm`, `strategies`, `codecs` and `train`. torch
is imported for annotations only, so `paceline schedule …` stays light.
"""

from paceline.types.communicator import Communicator, Ledger, Meeting, Store
from paceline.types.training import Batch, Bucket, Codec, Reducer, Replica, Strategy
from paceline.types.values import (
    DEFAULT_OPTIONS,
    CallOptions,
    Handler,
    Message,
    Rank,
    ReduceOp,
    Reply,
    Work,
)

__all__ = [
    "DEFAULT_OPTIONS",
    "Batch",
    "Bucket",
    "CallOptions",
    "Codec",
    "Communicator",
    "Handler",
    "Ledger",
    "Meeting",
    "Message",
    "Rank",
    "ReduceOp",
    "Reducer",
    "Replica",
    "Reply",
    "Store",
    "Strategy",
    "Work",
]
