"""Bytes sent, counted alike for all operations: by the schedule, and nothing for messages to oneself."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from paceline.comm import current
from paceline.comm.ledger import OPERATIONS, scheduled_share
from paceline.comm.simulated.simulate import simulate
from paceline.types import Message

pytestmark = pytest.mark.contract

BYTES, SIZE = 400, 4


def scheduled(start: Any) -> float:
    """Scheduled bytes of all ranks together after `start(comm)`."""

    def worker() -> float:
        comm = current.provided()
        comm.serve("echo", lambda src, message: message)
        start(comm)
        return float(comm.ledger.scheduled_bytes(comm.size))

    return sum(simulate(worker, num_workers=SIZE))


@pytest.mark.parametrize(
    ("start", "expected"),
    [
        (lambda c: c.all_reduce(torch.zeros(100)).wait(), 2 * (SIZE - 1) * BYTES),
        (lambda c: c.broadcast(torch.zeros(100)).wait(), (SIZE - 1) * BYTES),
        (lambda c: c.all_gather(torch.zeros(100 * SIZE), torch.zeros(100)).wait(), SIZE * (SIZE - 1) * BYTES),
        (lambda c: c.all_to_all(torch.zeros(100), torch.zeros(100)).wait(), (SIZE - 1) * BYTES),
        (lambda c: c.call(c.rank, "echo", Message({}, [torch.zeros(100)])).wait(), 0),
        (
            lambda c: c.call((c.rank + 1) % SIZE, "echo", Message({}, [torch.zeros(100)])).wait(),
            2 * SIZE * BYTES,
        ),
    ],
)
def test_bytes_of_all_ranks_are_those_of_the_schedule(start: Any, expected: int) -> None:
    assert scheduled(start) == pytest.approx(expected)


def test_one_rank_sends_nothing() -> None:
    collectives = [name for name in OPERATIONS if name not in ("send", "recv", "call", "post", "answer")]
    assert [scheduled_share(name, 1) for name in collectives] == [0.0] * len(collectives)
