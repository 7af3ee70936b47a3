"""What counts as training: seconds, payload bytes and waiting, without preparation, evaluation and saving."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from paceline.types import Communicator


class TrainingClock:
    """A stopwatch that also sets aside what the ledger counts while it is paused."""

    def __init__(self, comm: Communicator) -> None:
        self._comm, self._ledger = comm, comm.ledger
        self._since: float | None = None
        self._gathered_s = 0.0
        self._other_bytes = comm.ledger.payload_bytes  # what was sent before this job is not its training
        self._other_wait_s = comm.ledger.wait_s
        self._other_scheduled_bytes = comm.ledger.scheduled_bytes(comm.size)

    @property
    def seconds(self) -> float:
        """Seconds of training so far."""
        return self._gathered_s + (0.0 if self._since is None else self._comm.now() - self._since)

    @property
    def payload_bytes(self) -> int:
        """Payload bytes of training so far."""
        return self._ledger.payload_bytes - self._other_bytes

    @property
    def scheduled_bytes(self) -> float:
        """Bytes of training that this rank had to send to others so far; see `comm.ledger`."""
        return self._ledger.scheduled_bytes(self._comm.size) - self._other_scheduled_bytes

    @property
    def wait_s(self) -> float:
        """Seconds of training spent waiting for other ranks."""
        return self._ledger.wait_s - self._other_wait_s

    def counts(self) -> dict[str, float]:
        """Plain values for `job.stats()`: what was counted as training."""
        return {
            "payload_bytes": self.payload_bytes,
            "scheduled_bytes": self.scheduled_bytes,
            "wait_s": self.wait_s,
        }

    def start(self) -> None:
        """From now on time and bytes count."""
        if self._since is None:
            self._since = self._comm.now()

    def stop(self) -> None:
        """From now on nothing counts."""
        self._gathered_s, self._since = self.seconds, None

    def set(self, seconds: float) -> None:
        """Continue from a checkpoint's time."""
        self._gathered_s, self._since = seconds, None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time and bytes inside do not count as training."""
        running = self._since is not None
        self.stop()
        sent, waited = self._ledger.payload_bytes, self._ledger.wait_s
        scheduled_bytes = self._ledger.scheduled_bytes(self._comm.size)
        try:
            with self._comm.off_clock():
                yield
        finally:
            self._other_bytes += self._ledger.payload_bytes - sent
            self._other_wait_s += self._ledger.wait_s - waited
            self._other_scheduled_bytes += self._ledger.scheduled_bytes(self._comm.size) - scheduled_bytes
            if running:
                self.start()
