"""From one bit per element to increasing indexes: what the sparse codecs share.

Each 32-bit word covers 16 elements: its low half says which have a positive hit, its high half which a
negative one. This is also the bitmap form of a threshold payload. Without signs only the low half is used.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from paceline.codecs.kernel.device.arithmetic import TILE, num_programs, popcount16


def compact(words: torch.Tensor, counts: torch.Tensor, indexes: torch.Tensor, *, is_signed: bool) -> None:
    """Write index | sign << 31 of every hit, in order; what does not fit into `indexes` is left out.

    `words`: int32, one per 16 elements. `counts`: int32, hits per tile of `TILE` elements. `indexes`: int32.
    """
    if words.numel() and indexes.numel():
        ends = counts.cumsum(0, dtype=torch.int64)
        _compact[num_programs(16 * words.numel())](
            words, ends, indexes, words.numel(), indexes.numel(), is_signed, TILE // 16, num_warps=2
        )


@triton.jit(do_not_specialize=["num_words", "capacity"])
def _compact(words, ends, indexes, num_words, capacity, IS_SIGNED: tl.constexpr, WORDS: tl.constexpr):
    program = tl.program_id(0)
    first = tl.load(ends + program - 1, mask=program > 0, other=0)
    start = program.to(tl.int64) * WORDS
    local = tl.arange(0, WORDS)
    word = tl.load(words + start + local, mask=local < num_words - start, other=0)
    hits = (word | (word >> 16)) & 0xFFFF if IS_SIGNED else word
    count = popcount16(hits)
    position = first + (tl.cumsum(count, axis=0) - count)
    element = ((start + local) * 16).to(tl.int32)
    while tl.max(hits, axis=0) > 0:  # the lowest bit of every word that has one left
        lane = popcount16(((hits & -hits) - 1) & 0x7FFF)
        entry = element + lane
        if IS_SIGNED:
            entry = entry | (((word >> (16 + lane)) & 1) << 31)
        tl.store(indexes + position, entry, mask=(hits != 0) & (position < capacity))
        position += tl.where(hits != 0, 1, 0)
        hits = hits & (hits - 1)
