"""Types of the C++ core; one section per file of csrc/bind."""

import enum
from collections.abc import Sequence
from typing import Literal

# crc32c.cpp
def crc32c(data: bytes | bytearray | memoryview, crc: int = 0) -> int: ...

# codecs.cpp: addresses are those of contiguous float32 or uint8 memory
def codec_max_bytes(codec: str, numel: int, parameter: int) -> int: ...
def codec_encode(
    codec: str,
    x: int,
    residual: int,
    numel: int,
    out: int,
    capacity: int,
    *,
    source: int = 0,
    checksum: bool = False,
    parameter: int = 0,
    tau: float = 0.0,
    entropy: bool = False,
    stochastic: bool = False,
    key: int = 0,
) -> tuple[int, int]: ...
def codec_decode(
    codec: str, payload: int, payload_bytes: int, out: int, numel: int, accumulate: bool
) -> None: ...
def codec_limit_isa(limit: int) -> None: ...
def codec_isa() -> int: ...

# tensor.cpp
def register_tensor_types(api: object, classes: Sequence[type], /) -> bool: ...

# reductions.cpp
DTYPES: tuple[str, ...]
"""Names of the dtypes by code."""
REDUCE_OPS: tuple[str, ...]
"""Names of the operators by code."""

def is_reducible(dtype: int, op: int) -> bool: ...
def reduce(
    dtype: int, op: int, to: Sequence[int], source: Sequence[int], numel: int, divisor: int
) -> None: ...
def scale(to: int, source: int, numel: int, factor: float, /) -> None: ...
def reduce_isa() -> str: ...

# fabric.cpp
def eager_reduce_bytes(num_ranks: int) -> int: ...
def eager_exchange_bytes(num_ranks: int, is_same_for_all: bool) -> int: ...

ANY_RANK: int
"""The peer of a receive that takes a message from any rank."""

class OperationKind(enum.IntEnum):
    """The operations of a group."""

    ALL_REDUCE = ...
    REDUCE = ...
    REDUCE_SCATTER = ...
    BROADCAST = ...
    ALL_GATHER = ...
    GATHER = ...
    SCATTER = ...
    ALL_TO_ALL = ...
    BARRIER = ...
    SEND = ...
    RECEIVE = ...

class Operation:
    @property
    def is_done(self) -> bool: ...
    @property
    def peer(self) -> int: ...
    def raise_failure(self) -> None: ...

class Engine:
    def __init__(self) -> None: ...
    def allocate(self, num_bytes: int, /) -> object: ...
    def set_ranks_on_host(self, num_ranks: int, /) -> None: ...
    def stop(self) -> None: ...
    def watch(self, operation: Operation, token: int, /) -> bool: ...
    def take_completed(self, timeout_s: float, most: int, /) -> list[int]: ...
    def close_completions(self) -> None: ...
    def num_closing_groups(self) -> int: ...
    def is_shared(self, pointer: int, num_bytes: int, /) -> bool: ...
    @property
    def num_segments(self) -> int: ...
    @property
    def allocated_bytes(self) -> int: ...

class OperationCount:
    """What a ledger counts of one kind of operation."""

    calls: int
    payload_bytes: int

Address = tuple[int, int, int, int, int]

class Plan:
    VERBS: tuple[str, ...]
    def __init__(self, *, num_ranks: int, scratch_bytes: int, output_bytes: int) -> None: ...
    def add(
        self,
        *,
        verb: str,
        lane: int,
        channel: int,
        recv_peer: int,
        send_peer: int,
        num_bytes: int,
        dst: Sequence[tuple[int, int, int]],
        src: Sequence[tuple[int, int, int]],
        operand: Sequence[tuple[int, int, int]],
        deps: Sequence[int],
    ) -> None: ...

class TcpTransport:
    def __init__(
        self,
        engine: Engine,
        rank: int,
        size: int,
        secret: bytes,
        session: bytes,
        interfaces: str,
        towards: str,
    ) -> None: ...
    @property
    def endpoints(self) -> str: ...
    @property
    def wire_bytes(self) -> int: ...
    def set_peers(self, endpoints: Sequence[str], /) -> None: ...
    def close(self) -> None: ...

class _AnyGroup:
    """What all groups offer."""

    def combine(
        self,
        kind: int,
        source: int,
        output: int,
        numel: int,
        dtype: int,
        op: int,
        root: int,
        counts: Sequence[int],
        timeout_s: float,
    ) -> Operation | None: ...
    def exchange(
        self,
        kind: int,
        source: int,
        output: int,
        numel: int,
        dtype: int,
        root: int,
        send: Sequence[int],
        receive: Sequence[int],
        is_same_for_all: bool,
        timeout_s: float,
    ) -> Operation | None: ...
    def send(
        self, source: int, numel: int, dtype: int, peer: int, tag: int, timeout_s: float, /
    ) -> Operation | None: ...
    def receive(
        self, output: int, numel: int, dtype: int, peer: int, tag: int, timeout_s: float, /
    ) -> Operation | None: ...
    def wait(self, operation: Operation, timeout_s: float) -> None: ...
    def poll(self, operation: Operation) -> bool: ...
    def abort(self, why: str) -> None: ...
    def close(self) -> None: ...

class NetworkGroup(_AnyGroup):
    def __init__(self, transport: TcpTransport, id: int, rank: int, world_ranks: Sequence[int]) -> None: ...
    def run(
        self,
        plan: Plan,
        kind: int,
        source: int,
        output: int,
        numel: int,
        dtype: int,
        op: int,
        root: int,
        timeout_s: float,
    ) -> Operation | None: ...

class HierarchicalGroup(_AnyGroup):
    def __init__(
        self,
        rank: int,
        hosts: Sequence[int],
        local: SharedMemoryGroup,
        world: NetworkGroup,
        stripe: NetworkGroup | None,
    ) -> None: ...

class SharedMemoryGroup(_AnyGroup):
    def __init__(self, engine: Engine, rank: int, size: int, /) -> None: ...
    @property
    def address(self) -> Address: ...
    def connect(self, addresses: Sequence[Address], /) -> None: ...
    reduced: OperationCount
    """Counts the all_reduces; may be another group's."""

    def all_reduce(
        self, tensor: object, op: int, timeout_s: float, /
    ) -> Operation | Literal[False] | None: ...
    def all_reduce_now(self, tensor: object, op: int, timeout_s: float, /) -> Literal[False] | None: ...
    def combine_now(
        self,
        kind: int,
        source: int,
        output: int,
        numel: int,
        dtype: int,
        op: int,
        root: int,
        counts: Sequence[int],
        timeout_s: float,
    ) -> Operation | None: ...
    def exchange_now(
        self,
        kind: int,
        source: int,
        output: int,
        numel: int,
        dtype: int,
        root: int,
        send: Sequence[int],
        receive: Sequence[int],
        is_same_for_all: bool,
        timeout_s: float,
    ) -> Operation | None: ...
    def exchange_lists(
        self,
        kind: int,
        sources: Sequence[int],
        send: Sequence[int],
        outputs: Sequence[int],
        receive: Sequence[int],
        numel: int,
        dtype: int,
        is_same_for_all: bool,
        timeout_s: float,
    ) -> Operation | None: ...
    def exchange_lists_now(
        self,
        kind: int,
        sources: Sequence[int],
        send: Sequence[int],
        outputs: Sequence[int],
        receive: Sequence[int],
        numel: int,
        dtype: int,
        is_same_for_all: bool,
        timeout_s: float,
    ) -> Operation | None: ...
