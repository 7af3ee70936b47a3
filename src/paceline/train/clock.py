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

    @property
    def seconds(self) -> float:
        """Seconds of training so far."""
        return self._gathered_s + (0.0 if self._since is None else self._comm.now() - self._since)

    @property
    def payload_bytes(self) -> int:
        """Payload bytes of training so far."""
        return self._ledger.payload_bytes - self._other_bytes

    @property
    def wait_s(self) -> float:
        """Seconds of training spent waiting for other ranks."""
        return self._ledger.wait_s - self._other_wait_s

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
        try:
            with self._comm.off_clock():
                yield
        finally:
            self._other_bytes += self._ledger.payload_bytes - sent
            self._other_wait_s += self._ledger.wait_s - waited
            if running:
                self.start()
