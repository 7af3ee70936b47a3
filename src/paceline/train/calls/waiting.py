"""Before the ranks wait for each other outside of a method."""

from __future__ import annotations

from collections.abc import Iterable

from paceline.train.attachment import Attachment


def about_to_wait(attachments: Iterable[Attachment]) -> None:
    """This rank is about to wait for all others: it is level with them, and delays none.

    Args:
        attachments: Every model of the job.
    """
    for one in attachments:
        one.finish_skipped(meets=True)
        one.strategy.rest()
