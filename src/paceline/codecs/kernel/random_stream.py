"""Which random numbers an encoder draws: equal noise in tensors that are added would not average out."""

from __future__ import annotations

import hashlib


def use_stream(state: dict[str, object], *place: int | str) -> None:
    """Make the encoder that owns `state` draw from the stream of its place.

    Called before every encode: a state that was loaded may be that of another rank.

    Args:
        state: The codec's state of one tensor.
        place: What tells this encoder from all others of the job: its role, rank, tensor, chunk.
    """
    digest = hashlib.blake2b(repr(place).encode(), digest_size=8).digest()
    # 63 bits: checkpoints keep signed integers.
    state["stream"] = int.from_bytes(digest, "little") >> 1
