"""Which of several failed workers is shown as the cause."""

from __future__ import annotations

import dataclasses
import io
import signal

import pytest

from paceline.launchers.processes.console import Console
from paceline.launchers.processes.failure import ExitReason, first_failure

WHOLE = ("Traceback (most recent call last):", '  File "train.py", line 3', "ValueError: too hot")
CUT = WHOLE[:2]
GONE = (*CUT, "paceline.errors.PeerLost: rank 1 is gone")


def reason(rank: int, exit_code: int, traceback: tuple[str, ...] = (), **more: object) -> ExitReason:
    base = ExitReason(rank, "a", 100 + rank, exit_code, traceback)
    return dataclasses.replace(base, **more)  # type: ignore[arg-type]


def blamed(*reasons: ExitReason) -> int:
    failure = first_failure(reasons, 3)
    assert failure is not None
    return failure.rank


def test_the_first_by_time_is_the_cause() -> None:
    assert blamed(reason(0, 1, WHOLE, began_s=2.0), reason(1, 1, WHOLE, began_s=1.0)) == 1


def test_errors_about_lost_peers_are_consequences_whatever_their_date() -> None:
    assert blamed(reason(0, 1, GONE, began_s=1.0), reason(1, -signal.SIGKILL, began_s=2.0)) == 1


@pytest.mark.parametrize(
    "error",
    [
        "rank 0 (host a): call: this communicator cannot be used: rank 1 is lost (silence), and so on",
        "rank 0 (host a): rank 1 is lost (silence), and the job may not go on without it; see --min-workers",
    ],
)
def test_refusals_after_a_loss_are_consequences(error: str) -> None:
    """They may be dated before the death itself, which the launcher sees when it looks the next time."""
    refused = (*CUT, f"paceline.errors.CommError: {error}")
    assert blamed(reason(0, 1, refused, began_s=1.0), reason(1, -signal.SIGKILL, began_s=2.0)) == 1


def test_ranks_that_wait_for_a_block_of_rank_0_are_not_the_cause() -> None:
    told = "paceline.errors.PacelineError: rank 1: the block of job.main_first failed on rank 0, which ran it"
    assert blamed(reason(1, 1, (*CUT, told), began_s=1.0), reason(0, 1, WHOLE, began_s=2.0)) == 0


def test_a_traceback_that_the_launcher_cut_is_a_consequence() -> None:
    """The rank was still printing its error about the lost peer when it was told to stop."""
    cut = reason(0, -signal.SIGTERM, CUT, began_s=1.0, was_told_to_stop=True)
    assert blamed(cut, reason(1, -signal.SIGKILL, began_s=2.0)) == 1
    assert blamed(dataclasses.replace(cut, exit_code=1), reason(1, -signal.SIGKILL, began_s=2.0)) == 1


@pytest.mark.parametrize(
    ("failed", "last"),
    [
        (reason(1, 1, GONE), "[1] paceline.errors.PeerLost: rank 1 is gone (more: paceline errors PL03)"),
        (reason(1, 1, WHOLE), "[1] ValueError: too hot"),
        (reason(1, 1, (*GONE, "", *WHOLE)), "[1] ValueError: too hot"),
        (reason(1, -signal.SIGSEGV), "was ended by SIGSEGV (more: paceline errors PL07)"),
        (reason(1, 1, lost="its host is gone"), "its host is gone (more: paceline errors PL07)"),
        (reason(1, 7), "failed with exit code 7 and left no traceback"),
    ],
)
def test_the_report_ends_with_where_the_error_is_explained(failed: ExitReason, last: str) -> None:
    failure = first_failure([failed, reason(2, 1, GONE, began_s=9.0)], 3)
    assert failure is not None
    printed = io.StringIO()
    failure.show(Console(printed, printed))
    assert printed.getvalue().rstrip("\n").endswith(last)
    assert printed.getvalue().count("(more: ") == last.count("(more: ")
