"""The plain values behind `job.stats()`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from paceline.train.job import Job


def collect(job: Job) -> dict[str, Any]:
    """Return what `Job.stats` describes."""
    total = job.comm.ledger.snapshot()
    return {
        "rank": job.rank,
        "size": job.size,
        "fabric": job.comm.fabric,
        "strategy": job.strategy.name if job.attachments else None,
        "epoch": job.epoch,
        "steps": job.step,
        "samples": job.samples,
        "seconds": job.clock.seconds,
        "minibatches": sum(a.minibatches for a in job.attachments),
        "model_bytes": sum(a.replica.model_bytes for a in job.attachments),
        **total,
        **(job.attachments[-1].strategy.stats() if job.attachments else {}),
        "training": {"payload_bytes": job.clock.payload_bytes, "wait_s": job.clock.wait_s},
    }
