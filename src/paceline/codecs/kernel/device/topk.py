"""The k largest magnitudes: kernels for the format in codecs/topk.py, without the Rice code.

A sample guesses a magnitude that somewhat more than k elements reach. One pass adds the residual and marks
these candidates; the k largest are chosen among them alone, ties from the front. If too few reached it, all
are candidates: the guess decides the time, never the result.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import torch
import triton
import triton.language as tl

from paceline.codecs.kernel import payload
from paceline.codecs.kernel.device.arithmetic import EXACT, TILE, added, magnitude_of, num_programs
from paceline.codecs.kernel.device.compaction import compact
from paceline.codecs.kernel.device.threshold import check_increasing
from paceline.codecs.kernel.payload import WORDS, PayloadHeader
from paceline.errors import ProtocolError

_SAMPLE = 1 << 16


def encode_topk(
    x: torch.Tensor, residual: torch.Tensor | None, body: torch.Tensor, arguments: dict[str, Any]
) -> tuple[PayloadHeader, int, int]:
    """Write the body; see `device.encode`."""
    count = arguments["parameter"]
    if count:
        chosen, values = _largest(x, residual, count)
        body[: 4 * count].view(torch.float32).copy_(values)
        body[4 * count : 8 * count].view(torch.int32).copy_(chosen)
    return PayloadHeader("topk", x.numel(), count=count), 8 * count, 0


def decode_topk(header: PayloadHeader, body: torch.Tensor, out: torch.Tensor, accumulate: bool) -> None:
    """Store or add what the body holds; see `device.decode`."""
    if header.layout != WORDS or header.parameter != 0 or header.scale != 0.0:
        raise ProtocolError("topk payload: its layout is unknown, or it has a parameter or tau")
    payload.check_body_bytes(header, body.numel(), 8 * header.count)
    values = body[: 4 * header.count].view(torch.float32)
    indexes = body[4 * header.count :].view(torch.int32)
    check_increasing(header, indexes)
    if not accumulate:
        out.zero_()
    if header.count:
        _add_values[num_programs(header.count, 1024)](values, indexes, out, header.count, 1024)


def _largest(x: torch.Tensor, residual: torch.Tensor | None, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Increasing indexes and exact values of the `count` largest; afterwards `residual` holds the rest."""
    values = x if residual is None else residual
    candidates, num_infinite = _candidates(x, residual, _guess(x, residual, count))
    if candidates.numel() < count:
        candidates, num_infinite = _candidates(
            values, None, torch.zeros((), dtype=torch.int32, device=x.device)
        )
    magnitude = values.view(torch.int32)[candidates] & 0x7FFFFFFF
    least = magnitude.sort(descending=True).values[count - 1]
    is_larger, is_equal = magnitude > least, magnitude == least
    is_chosen = is_larger | (is_equal & (is_equal.cumsum(0) <= count - is_larger.sum()))
    chosen = candidates[is_chosen]
    sent = values[chosen]
    if residual is not None:
        residual[chosen] = 0.0
        if num_infinite:
            residual.nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
    return chosen, sent


def _guess(x: torch.Tensor, residual: torch.Tensor | None, count: int) -> torch.Tensor:
    """Bits of a magnitude that `count` elements or a few more should reach: int32, no dimensions."""
    if x.numel() <= 4 * _SAMPLE:
        return torch.zeros((), dtype=torch.int32, device=x.device)
    where = _places(x.numel(), x.device)
    sample = x[where] if residual is None else x[where] + residual[where]
    expected = count / x.numel() * _SAMPLE
    rank = min(_SAMPLE, math.ceil(expected + 4 * math.sqrt(expected)) + 8)
    return (sample.view(torch.int32) & 0x7FFFFFFF).topk(rank).values[-1]


@functools.lru_cache(maxsize=64)
def _places(numel: int, device: torch.device) -> torch.Tensor:
    """Indexes spread over the tensor without a period: multiples of 2^32 / golden ratio."""
    return torch.arange(_SAMPLE, dtype=torch.int64, device=device) * 2654435761 % numel


def _candidates(
    x: torch.Tensor, residual: torch.Tensor | None, least: torch.Tensor
) -> tuple[torch.Tensor, int]:
    """Indexes of what reaches `least`, and how many are not finite; `residual` becomes x + residual."""
    numel = x.numel()
    (tiles,) = num_programs(numel)
    words = torch.empty(payload.num_blocks(numel, 16), dtype=torch.int32, device=x.device)
    counts = torch.empty(2, tiles, dtype=torch.int32, device=x.device)
    _mark[(tiles,)](
        x, residual, least, words, counts, numel, tiles, residual is not None, TILE // 16, **EXACT
    )
    num_candidates, num_infinite = counts.sum(dim=1, dtype=torch.int64).tolist()
    candidates = torch.empty(num_candidates, dtype=torch.int32, device=x.device)
    compact(words, counts[0], candidates, is_signed=False)
    return candidates, num_infinite


@triton.jit(do_not_specialize=["tiles"])
def _mark(x, residual, least, words, counts, numel, tiles, HAS_RESIDUAL: tl.constexpr, GROUPS: tl.constexpr):
    program = tl.program_id(0)
    base = program.to(tl.int64) * (GROUPS * 16)
    left = numel - base
    lane = tl.arange(0, 16)[None, :]
    local = tl.arange(0, GROUPS)
    index = local[:, None] * 16 + lane
    inside = index < left
    value = tl.load(x + base + index, mask=inside, other=0.0)
    if HAS_RESIDUAL:
        value = added(value, tl.load(residual + base + index, mask=inside, other=0.0))
        tl.store(residual + base + index, value, mask=inside)
    magnitude = magnitude_of(value)
    is_candidate = (magnitude >= tl.load(least)) & inside
    word = tl.sum(tl.where(is_candidate, 1 << lane, 0), axis=1)
    tl.store(words + base // 16 + local, word, mask=local * 16 < left)
    tl.store(counts + program, tl.sum(tl.sum(is_candidate.to(tl.int32), axis=1), axis=0))
    is_infinite = magnitude >= 0x7F800000
    tl.store(counts + tiles + program, tl.sum(tl.sum(is_infinite.to(tl.int32), axis=1), axis=0))


@triton.jit(do_not_specialize=["count"])
def _add_values(values, indexes, out, count, SIZE: tl.constexpr):
    local = tl.program_id(0) * SIZE + tl.arange(0, SIZE)
    target = out + tl.load(indexes + local, mask=local < count, other=0)
    value = tl.load(target, mask=local < count, other=0.0)
    value += tl.load(values + local, mask=local < count, other=0.0)
    tl.store(target, value, mask=local < count)
