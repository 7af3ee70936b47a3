"""The self-describing payload: a 32-byte little-endian header, then the codec's own body.

    offset  0  4 bytes  "PLC1"              16  u32  block length, or Rice parameter
            4  u8       version, 1          20  f32  τ of threshold
            5  u8       codec number        24  u32  hits of a sparse body
            6  u8       dtype encoded       28  u32  CRC-32C of everything else, or 0
            7  u8       1 checksum | layout << 1 (0 words, 1 bitmap, 2 Rice code)
            8  u64      number of elements

The readable counterpart of `csrc/core/codecs/payload.cpp`, which validates in the same order.
"""

from __future__ import annotations

import math
import struct
from dataclasses import dataclass

import torch

from paceline.checksum import crc32c
from paceline.errors import ProtocolError

HEADER_BYTES = 32
MAX_NUMEL = 2**31 - 1
NUMBERS = {"fp16": 1, "bf16": 2, "int8": 3, "int4": 4, "onebit": 5, "threshold": 6, "topk": 7}
NAMES = {number: name for name, number in NUMBERS.items()}
SPARSE = {"threshold", "topk"}
SOURCES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}
WORDS, BITMAP, RICE = 0, 1, 2
MAX_RICE_PARAMETER = 30

_FIELDS = struct.Struct("<4sBBBBQIfI")


@dataclass(frozen=True)
class PayloadHeader:
    """What a payload says about itself."""

    codec: str
    numel: int
    source: int = 0
    has_checksum: bool = False
    layout: int = WORDS
    parameter: int = 0
    scale: float = 0.0
    count: int = 0


def join(header: PayloadHeader, body: bytes) -> bytes:
    """Put the header before the body."""
    flags = int(header.has_checksum) | header.layout << 1
    fields = _FIELDS.pack(
        b"PLC1",
        1,
        NUMBERS[header.codec],
        header.source,
        flags,
        header.numel,
        header.parameter,
        header.scale,
        header.count,
    )
    checksum = crc32c(body, crc32c(fields)) if header.has_checksum else 0
    return fields + struct.pack("<I", checksum) + body


def split(payload: bytes, *, codec: str | None, numel: int) -> tuple[PayloadHeader, bytes]:
    """Validate and read the header; raises ProtocolError. The body is still unchecked."""
    header, body = read(payload), payload[HEADER_BYTES:]
    check_fits(header, codec=codec, numel=numel)
    return header, body


def check_fits(header: PayloadHeader, *, codec: str | None, numel: int) -> None:
    """Raise ProtocolError unless it is of `codec` (None: any) and for `numel` elements."""
    if codec is not None and header.codec != codec:
        raise ProtocolError(f"a payload of codec {header.codec} was given to codec {codec}")
    if header.numel != numel:
        raise ProtocolError(
            f"{header.codec} payload: holds {header.numel} elements, but the tensor to decode into "
            f"has {numel}"
        )


def read(payload: bytes) -> PayloadHeader:
    """Validate and read a payload's header; raises ProtocolError."""
    if len(payload) < HEADER_BYTES:
        raise ProtocolError(f"codec payload of {len(payload)} bytes; its header alone has {HEADER_BYTES}")
    magic, version, number, source, flags, numel, parameter, scale, count = _FIELDS.unpack_from(payload)
    if magic != b"PLC1":
        raise ProtocolError("not a codec payload: the magic bytes PLC1 are missing")
    if version != 1:
        raise ProtocolError(
            f"codec payload of version {version}; this build reads version 1: "
            "use one build of Paceline on all workers"
        )
    if number not in NAMES:
        raise ProtocolError(f"codec payload of unknown codec number {number}")
    name = NAMES[number]
    if source > 3 or flags > 5:
        raise ProtocolError(f"{name} payload: unknown dtype or flags")
    if numel > MAX_NUMEL:
        raise ProtocolError(f"{name} payload: more than 2^31 - 1 elements")
    if count > numel:
        raise ProtocolError(f"{name} payload: more hits than elements")
    checksum = 0
    if flags & 1:
        checksum = crc32c(payload[HEADER_BYTES:], crc32c(payload[: HEADER_BYTES - 4]))
    if struct.unpack_from("<I", payload, 28)[0] != checksum:
        raise ProtocolError(f"{name} payload: the CRC-32C does not match; the bytes were damaged on the way")
    if name not in SPARSE and (flags >> 1 or count or payload[20:24] != b"\0\0\0\0"):
        raise ProtocolError(f"{name} payload: fields that only sparse payloads use are set")
    return PayloadHeader(name, numel, source, bool(flags & 1), flags >> 1, parameter, scale, count)


def check_body(header: PayloadHeader, body: bytes, expected: int) -> None:
    """Raise ProtocolError unless the body has exactly `expected` bytes."""
    check_body_bytes(header, len(body), expected)


def check_body_bytes(header: PayloadHeader, num_bytes: int, expected: int) -> None:
    """Raise ProtocolError unless a body of `num_bytes` has exactly `expected` bytes."""
    if num_bytes != expected:
        raise ProtocolError(
            f"{header.codec} payload: a body of {expected} bytes expected for {header.numel} elements, "
            f"got {num_bytes}"
        )


def check_block(header: PayloadHeader) -> int:
    """Return the block length; ProtocolError unless it is a power of two from 32 to 4096."""
    block = header.parameter
    if not is_block(block):
        raise ProtocolError(
            f"{header.codec} payload: block length {block} is not a power of two from 32 to 4096"
        )
    return block


def is_block(block: int) -> bool:
    """Whether a block of this length is allowed."""
    return isinstance(block, int) and 32 <= block <= 4096 and block & (block - 1) == 0


def num_blocks(numel: int, block: int) -> int:
    """Blocks that `numel` elements fill, the last one perhaps in part."""
    return math.ceil(numel / block)


def max_bytes(codec: str, numel: int, parameter: int) -> int:
    """What the core says, without it: bytes of the largest payload.

    `parameter` is the block length, or of topk the elements sent.
    """
    blocks = num_blocks(numel, parameter) if codec in ("fp16", "int8", "int4", "onebit") else 0
    words = 4 * (numel // 16 + 33)  # of threshold: the kernel's stores reach beyond the last hit
    body = {
        "fp16": 4 * blocks + 2 * numel,
        "bf16": 2 * numel,
        "int8": 4 * blocks + numel,
        "int4": 4 * blocks + 16 * math.ceil(numel / 32),
        "onebit": 2 * blocks + math.ceil(numel / 8),
        "threshold": max(words, 4 * num_blocks(numel, 16)),
        "topk": 8 * parameter,
    }[codec]
    return HEADER_BYTES + body


def as_bytes(tensor: torch.Tensor) -> bytes:
    """Bytes of a tensor in memory order."""
    return tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()


def as_tensor(data: bytes, dtype: torch.dtype) -> torch.Tensor:
    """1-D tensor of `dtype` over a copy of `data`."""
    return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)
