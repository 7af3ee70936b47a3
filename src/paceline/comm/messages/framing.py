"""Tensor messages as bytes: a small JSON header and raw tensors. Nothing is unpickled or evaluated.

Frame (little-endian):

    kind u8 · 3 zero bytes · header_bytes u32 · id u64 · payload_bytes u64 · header · payload

    header   UTF-8 JSON {"c": channel, "h": {name: int | float | str | bool}, "t": [[dtype, [shape]], …]}
    payload  the tensors' raw bytes in that order, without padding. If the header has "m": [pid, fd], they are
             in that block of shared memory and no payload follows.

Lengths are checked before anything is allocated, and the tensors' sizes must add up to payload_bytes.
"""

from __future__ import annotations

import enum
import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from paceline.errors import ConfigError, ProtocolError
from paceline.types import Message

PREFIX = struct.Struct("<B3xIQQ")
MAX_HEADER_BYTES = 1 << 18
MAX_PAYLOAD_BYTES = 1 << 35
MAX_TENSORS = 4096
MAX_DIMENSIONS = 16

Buffers = list[memoryview]
"""The bytes of one frame, as pieces for `sendmsg`."""


class FrameKind(enum.IntEnum):
    """What a frame is for; the first byte on the wire."""

    REQUEST = 1
    """A message whose answer is wanted."""
    POST = 2
    """A message without an answer."""
    ANSWER = 3
    ERROR = 4
    """The handler of a request failed; the header says how."""
    FLUSH = 5
    """Asks for FLUSHED once all earlier posts have been handled."""
    FLUSHED = 6
    GOODBYE = 7
    """The sender leaves in order: the end of the connection is no failure."""
    RETURNED = 8
    """The block of shared memory whose descriptor is the id has been read."""
    HEARTBEAT = 9
    """The sender lives, and has nothing else to say. The id counts its progress."""
    PENDING = 10
    """The answer with this id will come late; all ranks make progress."""


DTYPES: dict[str, torch.dtype] = {
    str(d).removeprefix("torch."): d
    for d in (
        torch.float64,
        torch.float32,
        torch.float16,
        torch.bfloat16,
        torch.int64,
        torch.int32,
        torch.int16,
        torch.int8,
        torch.uint8,
        torch.bool,
        torch.complex64,
        torch.complex128,
    )
}
_NAMES = {d: n for n, d in DTYPES.items()}


@dataclass(frozen=True, slots=True)
class FramePrefix:
    """The fixed first bytes of a frame."""

    kind: FrameKind
    header_bytes: int
    id: int
    """Connects an answer with its request."""
    payload_bytes: int


@dataclass(frozen=True, slots=True)
class FrameHeader:
    """The JSON part of a frame."""

    channel: str
    values: dict[str, int | float | str | bool]
    """The message's header."""
    tensors: list[torch.Tensor]
    """Empty ones of the announced dtypes and shapes, to receive into."""
    block: object = None
    """What it says about a block of shared memory, unchecked; see `shared_blocks.Borrower.read`."""


class Frame(NamedTuple):
    """A frame that has arrived whole."""

    kind: FrameKind
    id: int
    channel: str
    message: Message


def check(message: Message) -> None:
    """Raise ConfigError for a message whose header or tensors have an unsupported type or size."""
    for name, value in message.header.items():
        if not isinstance(name, str) or not isinstance(value, int | float | str | bool):
            raise ConfigError(
                f"message header {name!r}: int, float, str or bool expected, got {type(value).__name__}; "
                "put arrays into tensors"
            )
    if len(message.tensors) > MAX_TENSORS:
        raise ConfigError(
            f"message of {len(message.tensors)} tensors; at most {MAX_TENSORS}: concatenate them"
        )
    for t in message.tensors:
        if t.dtype not in _NAMES or t.layout != torch.strided or t.dim() > MAX_DIMENSIONS:
            raise ConfigError(
                f"message tensor of {t.dtype}, {t.layout}, {t.dim()} dimensions cannot be sent; "
                f"supported are dense tensors of {', '.join(DTYPES)} with up to {MAX_DIMENSIONS} dimensions"
            )


def owned(message: Message) -> Message:
    """Return a copy whose CPU tensors belong to the message, so the sender may go on writing its own."""
    return Message(
        dict(message.header),
        [t.detach().to("cpu", copy=True).contiguous().resolve_conj().resolve_neg() for t in message.tensors],
    )


def num_bytes(message: Message) -> int:
    """Payload bytes of a message's tensors."""
    return sum(t.numel() * t.element_size() for t in message.tensors)


def length(frame: Buffers) -> int:
    """Bytes of a frame on the socket."""
    return sum(len(b) for b in frame)


def raw(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a contiguous CPU tensor, writable, sharing its memory."""
    array: Any = tensor.reshape(-1).view(torch.uint8).numpy()  # mypy does not know that it is a buffer
    return memoryview(array).cast("B")


def encode(
    kind: FrameKind, id: int, channel: str, message: Message, block: tuple[int, int] | None = None
) -> Buffers:
    """Frame a message that `check` has accepted.

    Args:
        kind: What the frame is for.
        id: Connects an answer with its request; 0 for messages without an answer.
        channel: Name of the handler that gets it.
        message: The buffers share the memory of its tensors, so pass an `owned` one.
        block: Process id and descriptor of a block of shared memory that has the tensors already; they stay
            off the socket.
    """
    tensors = list(message.tensors)
    described: dict[str, object] = {
        "c": channel,
        "h": dict(message.header),
        "t": [[_NAMES[t.dtype], list(t.shape)] for t in tensors],
    }
    if block is not None:
        described["m"] = list(block)
    header = json.dumps(described, separators=(",", ":")).encode()
    payload = num_bytes(message)
    if len(header) > MAX_HEADER_BYTES or payload > MAX_PAYLOAD_BYTES:
        raise ConfigError(
            f"message on channel {channel!r}: header of {len(header)} and payload of {payload} bytes; "
            f"at most {MAX_HEADER_BYTES} and {MAX_PAYLOAD_BYTES}: split it"
        )
    head = PREFIX.pack(kind, len(header), id, payload) + header
    return [memoryview(head), *(raw(t) for t in tensors if t.numel() and block is None)]


def signal(kind: FrameKind, id: int = 0) -> Buffers:
    """Return a frame without header or payload."""
    return [memoryview(PREFIX.pack(kind, 0, id, 0))]


def parse_prefix(data: bytes | bytearray | memoryview, *, max_payload_bytes: int) -> FramePrefix:
    """Read and validate the fixed part. Raises ProtocolError."""
    kind, header_bytes, id, payload_bytes = PREFIX.unpack(data)
    try:
        known = FrameKind(kind)
    except ValueError:
        raise ProtocolError(f"frame of unknown kind {kind}") from None
    if header_bytes > MAX_HEADER_BYTES or payload_bytes > max_payload_bytes:
        raise ProtocolError(
            f"frame announces a header of {header_bytes} and a payload of {payload_bytes} bytes; "
            f"at most {MAX_HEADER_BYTES} and {max_payload_bytes} are accepted"
        )
    return FramePrefix(known, header_bytes, id, payload_bytes)


def parse_header(data: bytes | bytearray | memoryview, payload_bytes: int) -> FrameHeader:
    """Read and validate the JSON part of a frame whose tensors have `payload_bytes`. Raises ProtocolError."""
    try:
        value = json.loads(bytes(data))
        channel, header, shapes = value["c"], value["h"], value["t"]
        ok = isinstance(channel, str) and isinstance(header, dict) and isinstance(shapes, list)
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise ProtocolError(f"frame header cannot be read: {type(error).__name__}: {error}") from None
    if not ok or len(shapes) > MAX_TENSORS or not _is_plain(header):
        raise ProtocolError("frame header has values of the wrong kind")
    specs = [_tensor_spec(entry) for entry in shapes]
    total = sum(dtype.itemsize * math.prod(shape) for dtype, shape in specs)
    if total != payload_bytes:
        raise ProtocolError(f"tensors of {total} bytes announced in a payload of {payload_bytes} bytes")
    empty = [torch.empty(shape, dtype=dtype) for dtype, shape in specs]
    return FrameHeader(channel, header, empty, value.get("m"))


def _is_plain(header: Mapping[str, object]) -> bool:
    return all(isinstance(v, int | float | str | bool) for v in header.values())


def _tensor_spec(entry: object) -> tuple[torch.dtype, list[int]]:
    if not (isinstance(entry, list) and len(entry) == 2 and isinstance(entry[0], str)):
        raise ProtocolError(f"tensor description {entry!r:.80} is not [dtype, shape]")
    name, shape = entry
    if name not in DTYPES or not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS:
        raise ProtocolError(f"tensor description {entry!r:.80} has an unknown dtype or too many dimensions")
    if not all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 1 << 40 for n in shape):
        raise ProtocolError(f"tensor shape {shape!r:.80} is not a list of sizes")
    return DTYPES[name], shape
