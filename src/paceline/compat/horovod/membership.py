"""The process sets of a job: ranks and communicators, changed by all ranks at one point of their order."""

from __future__ import annotations

from collections.abc import Sequence

from paceline.types import Communicator


class Membership:
    """Which process sets there are; number 0 is the whole job.

    Every rank adds and removes in the same order, so that numbers agree without a message.

    Args:
        comm: The communicator of the whole job.
    """

    def __init__(self, comm: Communicator) -> None:
        self.ranks: dict[int, list[int]] = {0: list(range(comm.size))}
        """Ranks of every process set, sorted."""
        self._communicators: dict[int, Communicator] = {0: comm}
        self._next_id = 1

    def communicator(self, process_set: int) -> Communicator:
        """Return the communicator of a process set that this rank belongs to."""
        return self._communicators[process_set]

    def find(self, ranks: Sequence[int]) -> int | None:
        """Return the number of the process set with exactly these ranks, None if there is none."""
        return next((i for i, known in self.ranks.items() if known == sorted(ranks)), None)

    def add(self, ranks: Sequence[int]) -> int:
        """Form a communicator of `ranks` and return its number; collective over the whole job."""
        whole = self._communicators[0]
        part = whole.split(ranks)
        number = self._next_id
        self._next_id += 1
        self.ranks[number] = list(ranks)
        if part is not None:
            self._communicators[number] = part
        # No rank may ask rank 0 for an operation of a set that rank 0 does not know yet.
        whole.barrier().wait()
        return number

    def remove(self, process_set: int) -> None:
        """Forget a process set and close its communicator; collective over the whole job."""
        self.ranks.pop(process_set, None)
        communicator = self._communicators.pop(process_set, None)
        if communicator is not None:
            communicator.close()

    def close(self, *, goodbye: bool, whole_job: bool) -> None:
        """Close the communicators.

        Args:
            goodbye: False: peers take this rank for lost, which ends what they wait for.
            whole_job: Also that of the whole job.
        """
        # Parts first: they were made from the whole.
        for number in sorted(self._communicators, reverse=True):
            if number or whole_job:
                self._communicators[number].close(goodbye=goodbye)
