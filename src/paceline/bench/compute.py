"""How long a minibatch of a task takes here: for simulated clusters of such machines, and for one worker.

A minibatch of n samples takes step_s + sample_s · n: workers with a share of the batch pay the first part in
full, which is why small models do not get N times faster on N workers.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.data import default_collate

from paceline.bench.linear_compute import LinearCompute
from paceline.tasks.task import Task

_SECONDS = 2.0
_DIGITS = 2  # two runs on one machine hardly agree on more, and then are the same simulation


def measure(task: Task, *, few: int, many: int, threads: int, seconds: float = _SECONDS) -> LinearCompute:
    """Time minibatches of `few` and of `many` samples in turn, and draw the line through the fastest.

    The fastest, because whatever else runs here only adds time, and the simulated workers have machines of
    their own.

    Args:
        task: What is trained; a copy of its model is.
        few: Samples in a worker's share of the global batch, at least 1.
        many: Samples in the whole batch, at least `few`.
        threads: Intra-op threads of torch while measuring.
        seconds: How long to measure, about.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with torch.random.fork_rng(devices=[]):
            at_few, at_many = _fastest(task, (few, many), seconds)
    finally:
        torch.set_num_threads(before)
    sample_s = max(0.0, at_many - at_few) / (many - few) if many > few else 0.0
    step_s = max(0.0, at_few - sample_s * few)
    return LinearCompute(_rounded(step_s), _rounded(sample_s))


def fastest_threads(task: Task, size: int, most: int, seconds: float = _SECONDS / 2) -> int:
    """The number of intra-op threads with which one worker trains fastest here, at most `most`.

    Threads that wait for each other cost small models more than they give, and many times as much where
    other programs use the cores: one worker is not always fastest with all of them. All of the time counts,
    not the best of it: waiting is what is measured.

    Args:
        task: What is trained; a copy of its model is.
        size: Samples in a minibatch.
        most: Cores there are.
        seconds: How long to measure, about.
    """
    candidates = sorted({most, *(2**i for i in range(most.bit_length()))})
    if len(candidates) == 1:
        return most
    before = torch.get_num_threads()
    try:
        with torch.random.fork_rng(devices=[]):
            times = _times(task, [(size, threads) for threads in candidates], seconds)
    finally:
        torch.set_num_threads(before)
    totals = [sum(found) for found in times]
    fastest: int = candidates[totals.index(min(totals))]
    return fastest


def _fastest(task: Task, sizes: tuple[int, int], seconds: float) -> tuple[float, float]:
    few, many = (min(found) for found in _times(task, [(size, None) for size in sizes], seconds))
    return few, many


def _times(task: Task, cases: Sequence[tuple[int, int | None]], seconds: float) -> list[list[float]]:
    """Seconds of minibatches of each size and number of threads (None: as it is), in turn."""
    model, optimizer = copy.deepcopy((task.model, task.optimizer))
    batches = [_batch(task.train_set, size) for size, _ in cases]
    times: list[list[float]] = [[] for _ in cases]
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times[0]) < 3:
        for batch, (_, threads), found in zip(batches, cases, times, strict=True):
            if threads is not None:
                torch.set_num_threads(threads)
            start = time.perf_counter()
            task.loss(model(batch[0]), batch[1]).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            optimizer.zero_grad()
            found.append(time.perf_counter() - start)
    return [found[1:] for found in times]  # the first is the warm-up


def _batch(train_set: Any, size: int) -> Any:
    """The first samples as a batch, repeated if there are fewer."""
    inputs, targets = default_collate([train_set[i % len(train_set)] for i in range(size)])
    return inputs, targets


def _rounded(seconds: float) -> float:
    return float(f"{seconds:.{_DIGITS}g}")
