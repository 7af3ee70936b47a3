"""The plain values of one rank that `job.stats()` returns, and those that a row of the log begins with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from paceline.comm.communicator import FabricCommunicator
from paceline.train.attachment import Attachment
from paceline.train.clock import TrainingClock
from paceline.train.logs.logbook import TrainingCounts


def collect(
    comm: FabricCommunicator,
    attachments: Sequence[Attachment],
    clock: TrainingClock,
    *,
    epoch: int,
    steps: int,
    samples: int,
) -> dict[str, Any]:
    """What was trained, how long this rank waited, what it sent; of the strategy prepared last."""
    strategy = attachments[-1].strategy if attachments else None
    return {
        "rank": comm.rank,
        "size": comm.size,
        "fabric": comm.fabric,
        "strategy": None if strategy is None else strategy.name,
        "epoch": epoch,
        "steps": steps,
        "samples": samples,
        "seconds": clock.seconds,
        "minibatches": sum(a.minibatches for a in attachments),
        "model_bytes": sum(a.replica.model_bytes for a in attachments),
        **comm.ledger.snapshot(),
        **({} if strategy is None else strategy.stats()),
        "training": clock.counts(),
    }


def counts(
    attachments: Sequence[Attachment], clock: TrainingClock, epoch: int, step: int, samples: int
) -> TrainingCounts:
    """What the log counts, as it is now."""
    return TrainingCounts(
        epoch=epoch,
        step=step,
        seconds=clock.seconds,
        samples=samples,
        payload_bytes=clock.payload_bytes,
        wait_s=clock.wait_s,
        staleness=attachments[-1].strategy.stats().get("staleness") if attachments else None,
    )
