"""What a rank asks for and what the coordinator answers: plain values, sent as JSON, validated on arrival."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from paceline.errors import ProtocolError
from paceline.types import Message

MEMBERSHIP_KINDS = ("add_process_set", "remove_process_set")
KINDS = (
    *("allreduce", "allgather", "broadcast", "alltoall", "reducescatter", "barrier", "join"),
    *MEMBERSHIP_KINDS,
)
_MAX_BYTES = 64 << 20


@dataclass(frozen=True)
class Request:
    """One named operation on the tensors of one rank."""

    name: str
    kind: str
    shapes: list[list[int]] = field(default_factory=list)
    dtypes: list[str] = field(default_factory=list)
    op: str = "Sum"
    root: int = 0
    prescale: float = 1.0
    postscale: float = 1.0
    process_set: int = 0
    splits: list[int] = field(default_factory=list)
    """alltoall: rows for each rank. add_process_set: its ranks. remove_process_set: its number."""

    def signature(self) -> tuple[object, ...]:
        """What must be equal on all ranks."""
        may_differ = 1 if self.kind in ("allgather", "alltoall") else 0  # the first dimension
        shapes = [s[may_differ:] for s in self.shapes]
        same = self.splits if self.kind in MEMBERSHIP_KINDS else []
        return (self.kind, shapes, self.dtypes, self.op, self.root, self.prescale, self.postscale, same)

    def num_bytes(self) -> int:
        """Return the size of the tensors."""
        total = 0
        for shape, dtype in zip(self.shapes, self.dtypes, strict=True):
            count = 1
            for n in shape:
                count *= n
            total += count * dtype_of(dtype).itemsize
        return total


@dataclass(frozen=True)
class Response:
    """Operations to perform now, as one: several requests are fused all-reduces."""

    requests: list[Request]
    error: str = ""
    last_joined: int = -1
    rows: list[list[int]] = field(default_factory=list)
    """One list per rank of the process set: first dimensions (allgather) or splits (alltoall)."""


def dtype_of(name: str) -> torch.dtype:
    """Return torch.float32 for "float32"."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype):
        raise ProtocolError(f"unknown dtype {name!r} in a request")
    return dtype


def describe(tensors: Sequence[Tensor]) -> dict[str, Any]:
    """Return shapes and dtypes for a Request."""
    return {
        "shapes": [list(t.shape) for t in tensors],
        "dtypes": [str(t.dtype).removeprefix("torch.") for t in tensors],
    }


def pack(items: Sequence[Request] | Sequence[Response]) -> Message:
    """Return a Message that carries `items`."""
    data = json.dumps([asdict(i) for i in items]).encode()
    return Message({}, [torch.frombuffer(bytearray(data), dtype=torch.uint8)])


def pack_text(text: str) -> Message:
    """Return a Message that carries a text."""
    return Message({}, [torch.frombuffer(bytearray(text.encode() or b" "), dtype=torch.uint8)])


def unpack_text(message: Message) -> str:
    """Return the text of a message; ProtocolError if it holds something else."""
    if len(message.tensors) != 1 or message.tensors[0].dtype != torch.uint8:
        raise ProtocolError("a text travels as one tensor of bytes")
    return bytes(message.tensors[0].numpy()).decode(errors="replace")


def _unpack(message: Message) -> list[dict[str, Any]]:
    if len(message.tensors) != 1 or message.tensors[0].numel() > _MAX_BYTES:
        raise ProtocolError("a negotiation message carries one tensor of at most 64 MiB")
    try:
        items = json.loads(bytes(message.tensors[0].numpy()))
        assert isinstance(items, list)
        return items
    except (ValueError, AssertionError) as error:
        raise ProtocolError(f"a negotiation message cannot be read: {error}") from error


def unpack_requests(message: Message) -> list[Request]:
    """Return the requests of a message; ProtocolError if it holds something else."""
    try:
        requests = [Request(**item) for item in _unpack(message)]
    except TypeError as error:
        raise ProtocolError(f"not a request: {error}") from error
    for r in requests:
        if r.kind not in KINDS or len(r.shapes) != len(r.dtypes):
            raise ProtocolError(f"request {r.name!r} of kind {r.kind!r} is malformed")
    return requests


def unpack_responses(message: Message) -> list[Response]:
    """Return the responses of a message; ProtocolError if it holds something else."""
    try:
        return [Response([Request(**r) for r in item.pop("requests")], **item) for item in _unpack(message)]
    except (TypeError, KeyError) as error:
        raise ProtocolError(f"not a response: {error}") from error
