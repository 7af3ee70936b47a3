"""What the store of a job and its clients say to each other, after the handshake.

    request   bytes u32 · operation u8 · fields        field   bytes u32 · content
    answer    bytes u32 · status u8 · fields

Every request has one answer; a client sends the next request on a connection after the answer. Numbers are
decimal text.
"""

from __future__ import annotations

import enum
import struct
from collections.abc import Sequence

from paceline.errors import ProtocolError

LENGTH = struct.Struct("<I")
MOST_BYTES = 64 << 20
PURPOSE = "store"


class StoreOperation(enum.IntEnum):
    """What a client asks for, with its fields."""

    SET = 1
    """keys and values, in turn."""
    ADD = 2
    """key, number. Answer: the sum."""
    COMPARE_SET = 3
    """key, expected, desired. Answer: the value afterwards."""
    APPEND = 4
    """key, what to append."""
    DELETE = 5
    """key. Answer: "1" if it was there."""
    CHECK = 6
    """keys. Answer: "1" if all are there."""
    GET = 7
    """milliseconds to wait, keys. Answer: their values, once all are there."""
    LIST = 8
    """no fields. Answer: all keys."""


class Status(enum.IntEnum):
    """How a request ended."""

    DONE = 0
    TIMEOUT = 1
    """Some keys did not come. Fields: those."""
    REFUSED = 2
    """Field: why."""


def encode(code: int, fields: Sequence[bytes]) -> bytes:
    """A request or an answer."""
    parts = [bytes([code])]
    for field in fields:
        parts += [LENGTH.pack(len(field)), field]
    body = b"".join(parts)
    return LENGTH.pack(len(body)) + body


def body_length(head: bytes) -> int:
    """How many bytes follow the first four. Raises ProtocolError."""
    (length,) = LENGTH.unpack(head)
    if not 0 < length <= MOST_BYTES:
        raise ProtocolError(f"a store message of {length} bytes; 1 to {MOST_BYTES} expected")
    return int(length)


def decode(body: bytes) -> tuple[int, list[bytes]]:
    """StoreOperation or status, and the fields. Raises ProtocolError."""
    fields, at = [], 1
    while at < len(body):
        end = at + LENGTH.size
        size = LENGTH.unpack(body[at:end])[0] if end <= len(body) else MOST_BYTES
        if end + size > len(body):
            raise ProtocolError("a store message whose fields are longer than itself")
        fields.append(body[end : end + size])
        at = end + size
    return body[0], fields
