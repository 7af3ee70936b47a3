"""±tau updates with a residual: kernels for the format in codecs/threshold.py, without the Rice code.

One pass moves the residual and writes a bitmap (2 bits per element); a second pass over the bitmap alone
writes the words, if they are at most one per 16 elements.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl

from paceline.codecs.kernel import payload
from paceline.codecs.kernel.device.arithmetic import EXACT, TILE, magnitude_of, num_programs, popcount16
from paceline.codecs.kernel.device.compaction import compact
from paceline.codecs.kernel.payload import BITMAP, WORDS, PayloadHeader
from paceline.errors import ProtocolError


def encode_threshold(
    x: torch.Tensor, residual: torch.Tensor | None, body: torch.Tensor, arguments: dict[str, Any]
) -> tuple[PayloadHeader, int, int]:
    """Write the body; see `device.encode`. The residual is required."""
    assert residual is not None
    numel, tau = x.numel(), arguments["tau"]
    plain = PayloadHeader("threshold", numel, scale=tau)
    if not numel:
        return plain, 0, 0
    (tiles,) = num_programs(numel)
    groups = torch.empty(payload.num_blocks(numel, 16), dtype=torch.int32, device=x.device)
    counts = torch.empty(2, tiles, dtype=torch.int32, device=x.device)
    _mark[(tiles,)](x, residual, groups, counts, numel, tiles, tau, TILE // 16, **EXACT)
    words = body[: 4 * (numel // 16)].view(torch.int32)
    compact(groups, counts[0], words, is_signed=True)
    count, skipped = counts.sum(dim=1, dtype=torch.int64).tolist()
    if count <= numel // 16:
        return PayloadHeader("threshold", numel, scale=tau, count=count), 4 * count, skipped
    body[: 4 * groups.numel()].view(torch.int32).copy_(groups)
    header = PayloadHeader("threshold", numel, layout=BITMAP, scale=tau, count=count)
    return header, 4 * groups.numel(), skipped


def decode_threshold(header: PayloadHeader, body: torch.Tensor, out: torch.Tensor, accumulate: bool) -> None:
    """Store or add what the body holds; see `device.decode`."""
    if not (0.0 < header.scale < math.inf) or header.parameter != 0:
        raise ProtocolError("threshold payload: tau is not positive and finite, or it has a parameter")
    if header.layout == WORDS:
        payload.check_body_bytes(header, body.numel(), 4 * header.count)
        words = body.view(torch.int32)
        check_increasing(header, words & 0x7FFFFFFF)
        if not accumulate:
            out.zero_()
        if header.count:
            _add_words[num_programs(header.count, 1024)](words, out, header.count, header.scale, 1024)
        return
    payload.check_body_bytes(header, body.numel(), 4 * payload.num_blocks(header.numel, 16))
    groups = body.view(torch.int32)
    _check_bitmap(header, groups)
    if header.numel:
        _decode_bitmap[num_programs(header.numel)](
            groups, out, header.numel, header.scale, accumulate, TILE // 16, **EXACT
        )


def check_increasing(header: PayloadHeader, indexes: torch.Tensor) -> None:
    """ProtocolError unless the indexes (int32) increase within the tensor."""
    if not indexes.numel():
        return
    is_wrong = (indexes[1:] <= indexes[:-1]).any() | (indexes[0] < 0) | (indexes[-1] >= header.numel)
    if bool(is_wrong):
        raise ProtocolError(
            f"{header.codec} payload: indexes are not increasing, or go beyond the tensor's end"
        )


def _check_bitmap(header: PayloadHeader, groups: torch.Tensor) -> None:
    facts = torch.zeros(3, dtype=torch.int32, device=groups.device)
    if groups.numel():
        facts[2:].copy_(groups[-1:])
        _inspect[num_programs(groups.numel())](groups, facts, groups.numel(), TILE)
    hits, is_hit_twice, last = facts.tolist()
    filled = header.numel % 16
    beyond = last & ~(((1 << filled) - 1) * 0x10001) & 0xFFFFFFFF if filled else 0
    if is_hit_twice or beyond:
        raise ProtocolError("threshold payload: an element is hit twice, or one beyond the tensor's end")
    if hits != header.count:
        raise ProtocolError("threshold payload: the bitmap does not have the hits it claims")


@triton.jit(do_not_specialize=["tiles"])
def _mark(x, residual, groups, counts, numel, tiles, tau, GROUPS: tl.constexpr):
    program = tl.program_id(0)
    base = program.to(tl.int64) * (GROUPS * 16)
    left = numel - base
    lane = tl.arange(0, 16)[None, :]
    index = tl.arange(0, GROUPS)[:, None] * 16 + lane
    inside = index < left
    old = tl.load(residual + base + index, mask=inside, other=0.0)
    value = old + tl.load(x + base + index, mask=inside, other=0.0)
    magnitude = magnitude_of(value)
    is_finite = magnitude < 0x7F800000
    is_hit = is_finite & (magnitude.to(tl.float32, bitcast=True) >= tau)
    is_negative = value < 0
    rest = value - tl.where(is_negative, -tau, tau)
    rest = tl.where(is_finite, tl.where(is_hit, rest, value), old)
    tl.store(residual + base + index, rest, mask=inside)
    bit = tl.where(is_negative, 16 + lane, lane)
    word = tl.sum(tl.where(is_hit, 1 << bit, 0), axis=1)
    local = tl.arange(0, GROUPS)
    tl.store(groups + base // 16 + local, word, mask=local * 16 < left)
    hits = tl.sum(tl.sum(is_hit.to(tl.int32), axis=1), axis=0)
    skipped = tl.sum(tl.sum((inside & (magnitude >= 0x7F800000)).to(tl.int32), axis=1), axis=0)
    tl.store(counts + program, hits)
    tl.store(counts + tiles + program, skipped)


@triton.jit(do_not_specialize=["count"])
def _add_words(words, out, count, tau, SIZE: tl.constexpr):
    local = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    word = tl.load(words + local, mask=local < count, other=0)
    target = out + (word & 0x7FFFFFFF)
    value = tl.load(target, mask=local < count, other=0.0) + tl.where(word < 0, -tau, tau)
    tl.store(target, value, mask=local < count)


@triton.jit
def _inspect(groups, facts, num_groups, SIZE: tl.constexpr):
    """facts[0] += hits; facts[1] = 1 if an element is hit in both directions."""
    local = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    word = tl.load(groups + local, mask=local < num_groups, other=0)
    low, high = word & 0xFFFF, (word >> 16) & 0xFFFF
    tl.atomic_add(facts, tl.sum(popcount16(low) + popcount16(high), axis=0))
    tl.atomic_max(facts + 1, tl.max(tl.where((low & high) != 0, 1, 0), axis=0))


@triton.jit
def _decode_bitmap(groups, out, numel, tau, ACCUMULATE: tl.constexpr, GROUPS: tl.constexpr):
    base = tl.program_id(0).to(tl.int64) * (GROUPS * 16)
    left = numel - base
    local = tl.arange(0, GROUPS)
    word = tl.load(groups + base // 16 + local, mask=local * 16 < left, other=0)[:, None]
    lane = tl.arange(0, 16)[None, :]
    index = local[:, None] * 16 + lane
    difference = ((word >> lane) & 1) - ((word >> (16 + lane)) & 1)
    value = difference.to(tl.float32) * tau
    if ACCUMULATE:
        value = tl.load(out + base + index, mask=index < left, other=0.0) + value
    tl.store(out + base + index, value, mask=index < left)
