"""Generated loops: by several ranks as by one process, or refused in words that mend it.

`many.py` beside it runs as many as one likes.
"""

from __future__ import annotations

import re
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]  # also for scripts

from choices import Choices, draw, is_exact, shrunk, told  # noqa: E402
from habits import REFUSALS  # noqa: E402
from loop import Run  # noqa: E402
from plain import PlainJob, is_plain  # noqa: E402
from runs import assert_equal  # noqa: E402

import paceline  # noqa: E402
from paceline.comm.simulated.simulate import simulate  # noqa: E402
from paceline.errors import PacelineError, RunLengthWarning  # noqa: E402

REFUSED = (r"LBFGS",)
COUNTS = ("schedulers", "length", "counts")


class ThreadJob:
    """A rank's job, which can be started again in the same thread."""

    def __init__(self, logs: Path | None) -> None:
        self.__dict__["job"] = paceline.init(seed=0, log_dir=logs)
        self.__dict__["logs"] = logs

    def __getattr__(self, name: str) -> Any:
        return getattr(self.job, name)

    def again(self) -> ThreadJob:
        self.end()
        return ThreadJob(self.logs)

    def end(self) -> None:
        """Close the files of its log, which nobody waits for."""
        self.job.logbook.close({})


def by(size: int, c: Choices) -> list[Any]:
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", RunLengthWarning)
        warnings.simplefilter("ignore", UserWarning)

        def rank() -> Any:
            logs = Path(folder) / "logs" if c["aside"] == "track" else None
            run = Run(c, ThreadJob(logs), Path(folder))
            try:
                return run()
            finally:
                run.job.end()

        return list(simulate(rank, num_workers=size))


def plainly(c: Choices) -> Any:
    with tempfile.TemporaryDirectory() as folder:
        return Run({**c, "resume": None}, PlainJob(), Path(folder))()  # as if it had not been interrupted


def difference(c: Choices) -> str:
    """What is wrong with this loop, in words; "" if nothing is."""
    torch.set_num_threads(1)
    if c["habit"] is not None:
        return next(filter(None, (not_refused(c, size) for size in (2, 3))), "")
    one, failure = attempt(lambda: plainly(c) if is_plain(c) else by(1, c)[0])
    if failure:
        return f"one process: {failure}"
    one.pop("minibatches")
    for size in (1, 2, 3) if is_plain(c) else (2, 3):
        ranks, failure = attempt(lambda size=size: by(size, c))  # type: ignore[misc]
        if any(re.search(known, failure) for known in REFUSED):
            continue
        if wrong := f"{size} ranks: {failure}" if failure else unequal(c, ranks, one):
            return wrong
    return ""


def attempt(body: Callable[[], Any]) -> tuple[Any, str]:
    """What `body` returns, or the first line of what it raises."""
    try:
        return body(), ""
    except Exception as error:
        return None, f"{type(error).__name__}: {next(iter(str(error).splitlines()), '')}"


def not_refused(c: Choices, size: int) -> str:
    """What is wrong with the refusal of a loop with a habit that cannot be kept; "" if nothing is."""
    try:
        by(size, c)
    except PacelineError as error:
        expected = REFUSALS[c["habit"]]
        return "" if re.search(expected, str(error)) else f"{size} ranks: {expected!r} not in: {error}"
    except Exception as error:
        return f"{size} ranks: {type(error).__name__} instead of a refusal: {error}"
    return f"{size} ranks: not refused"


def has_diverged(one: dict[str, Any]) -> bool:
    """Whether one process has left the numbers in which rounding stays small; LBFGS without a search may."""
    tensors = [t for model in one["models"] for t in model if t.is_floating_point() or t.is_complex()]
    return any(not t.abs().max() < 1e6 for t in tensors if t.numel())


def unequal(c: Choices, ranks: list[Any], one: Any) -> str:
    """Which rank's results differ from those of one process, or from rank 0's; "" if none do."""
    rounds_to_float32 = c["model"] == "mixed_dtype" or c["codec"]
    tolerance = 1e-5 if rounds_to_float32 else 1e-7
    for rank, ours in enumerate(ranks):
        counted, updates = ours.pop("minibatches"), ours["updates"]
        if ours.pop("constants") != one["constants"]:
            return f"rank {rank} of {len(ranks)}: buffers that nothing changes are not equal bit for bit"
        # Of a window that was not declared, each backward pass may be a minibatch.
        if c["accumulation"] == 1 and counted != [updates] * c["num_models"]:
            return f"rank {rank} of {len(ranks)} counts {counted} minibatches, there were {updates}"
        try:
            if is_exact(c) and not (c["optimizer"] == "lbfgs" and has_diverged(one)):
                assert_equal(ours, {k: one[k] for k in ours}, tolerance=tolerance)
            else:
                assert_equal(ours["models"], ranks[0]["models"], tolerance=0.0)
                assert_equal({k: ours[k] for k in COUNTS}, {k: one[k] for k in COUNTS})
        except AssertionError as error:
            return f"rank {rank} of {len(ranks)} differs: {str(error)[:300]}"
    return ""


def smallest(c: Choices) -> Choices:
    """A loop with as few choices as possible that is still wrong."""
    while True:
        for candidate in shrunk(c):
            if difference(candidate):
                c = candidate
                break
        else:
            return c


@pytest.mark.parametrize("seed", range(60))
def test_a_loop(seed: int) -> None:
    c = draw(seed)
    wrong = difference(c)
    assert not wrong, f"{told(smallest(c))}\n{wrong}\nfirst found in: {told(c)}"


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("first", range(1000, 1800, 400))
def test_many_loops(first: int) -> None:
    for seed in range(first, first + 400):
        test_a_loop(seed)
