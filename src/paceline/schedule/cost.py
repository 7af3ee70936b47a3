"""What an algorithm claims to cost, and what a program really costs."""

from __future__ import annotations

from dataclasses import dataclass, field
from fractions import Fraction

import numpy as np

from paceline.schedule.program import REDUCE, Program


@dataclass(frozen=True)
class Cost:
    """Steps, messages and bytes of an algorithm: what it claims, and what `count` counts.

    Attributes:
        steps: Communication steps, each dependent on the one before. messages: The most messages that one
        rank sends. sent: The most that one rank sends, as a share of S, the full buffer. reduced: The most
        that one rank combines, as a share of S. path_sent: Share of S sent along the longest chain of
        dependent steps; default `sent`. The closed form of
            the time needs it where the chain is not one rank's own: trees, folding, pipelines.
        path_reduced: The same of what is combined; default `reduced`.
        has_closed_form: Whether the time follows from these shares at all.
    """

    steps: int
    messages: int
    sent: Fraction
    reduced: Fraction = Fraction(0)
    path_sent: Fraction | None = field(default=None, compare=False)
    path_reduced: Fraction | None = field(default=None, compare=False)
    has_closed_form: bool = field(default=True, compare=False)

    def path(self) -> tuple[Fraction, Fraction]:
        """Return the shares of S sent and reduced along the longest chain."""
        sent = self.sent if self.path_sent is None else self.path_sent
        return sent, self.reduced if self.path_reduced is None else self.path_reduced

    def time_s(
        self,
        num_bytes: float,
        *,
        latency_s: float,
        seconds_per_byte: float,
        reduce_seconds_per_byte: float = 0.0,
    ) -> float | None:
        """Closed form of the time where every rank has one full-duplex port and all pairs are alike.

        steps · α + path_sent · S · β + path_reduced · S · γ; None if there is none. Where reductions overlap
        transfers it holds for γ ≤ β.
        """
        if not self.has_closed_form:
            return None
        sent, reduced = self.path()
        per_byte = float(sent) * seconds_per_byte + float(reduced) * reduce_seconds_per_byte
        return self.steps * latency_s + num_bytes * per_byte


def count(program: Program) -> Cost:
    """Count what a program really costs, by walking its steps."""
    p = program.num_ranks
    steps = 0
    messages, sent, reduced = (np.zeros(p, dtype=np.int64) for _ in range(3))
    for step in program.steps():
        away = step.src_rank != step.dst_rank
        if not away.any():
            continue
        steps += 1
        src, dst, n = step.src_rank[away], step.dst_rank[away], step.count[away]
        sent += np.bincount(src, weights=n, minlength=p).astype(np.int64)
        pairs = np.unique((src * p + dst) * program.num_channels + step.channel[away])
        messages += np.bincount(pairs // (p * program.num_channels), minlength=p)
        adds = step.kind[away] == REDUCE
        reduced += np.bincount(dst[adds], weights=n[adds], minlength=p).astype(np.int64)
    share = max(program.num_chunks, 1)
    return Cost(
        steps, int(messages.max()), Fraction(int(sent.max()), share), Fraction(int(reduced.max()), share)
    )


class No(str):
    """The answer of `supports` that is not True: a reason, which is false in a condition."""

    __slots__ = ()

    def __bool__(self) -> bool:
        return False


def only(operations: tuple[str, ...], operation: str) -> bool | No:
    """Whether `operation` is one of those that an algorithm is meant for."""
    return operation in operations or No(f"it is meant for {', '.join(operations)}")


def pipelined(operations: tuple[str, ...], operation: str, segments: int) -> bool | No:
    """As `only`, for an algorithm that cuts its data into segments."""
    return (
        only(operations, operation) if segments >= 1 else No(f"segments: 1 or more expected, got {segments}")
    )


def few_enough(num_ranks: int, peers: int) -> bool | No:
    """Whether a step in which every rank has `peers` peers fits in memory: at most 2^22 transfers."""
    most = (1 << 22) // num_ranks
    return peers <= most or No(
        f"every one of {num_ranks} ranks with {peers} peers in one step; at most {most}"
    )
