"""Collectives over the living ranks give what one process computes, and refuse what does not fit together."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from paceline.comm.messages.mailbox import Mailbox
from paceline.comm.survivors import Survivors, SurvivorWork
from paceline.errors import CommError
from paceline.types import ReduceOp

SIZE = 3


class Directory(dict):
    def publish(self, rank: int, address: str) -> None:
        self[rank] = address

    def lookup(self, rank: int) -> str | None:
        return self.get(rank)


@pytest.fixture
def ranks() -> Iterator[list[Survivors]]:
    directory = Directory()
    boxes = [
        Mailbox(rank=r, size=SIZE, secret=b"k" * 32, directory=directory, timeout_s=5) for r in range(SIZE)
    ]
    yield [Survivors(box, r, SIZE) for r, box in enumerate(boxes)]
    for box in boxes:
        box.close(timeout_s=1)


def sources(numel: int) -> list[torch.Tensor]:
    return [torch.arange(numel, dtype=torch.float32) + 100 * r for r in range(SIZE)]


def finish(works: list[SurvivorWork]) -> None:
    for work in works:
        work.wait(5)


def test_operations_in_place(ranks: list[Survivors]) -> None:
    tensors = sources(4)
    finish([rank.start_all_reduce(t, ReduceOp.SUM) for rank, t in zip(ranks, tensors, strict=True)])
    assert all(torch.equal(t, sum(sources(4))) for t in tensors)
    tensors = sources(4)
    finish([rank.start_reduce(t, 1, ReduceOp.MAX) for rank, t in zip(ranks, tensors, strict=True)])
    assert torch.equal(tensors[1], sources(4)[2])
    tensors = sources(4)
    finish([rank.start_broadcast(t, 2) for rank, t in zip(ranks, tensors, strict=True)])
    assert all(torch.equal(t, sources(4)[2]) for t in tensors)
    finish([rank.start_barrier() for rank in ranks])


def test_gathers(ranks: list[Survivors]) -> None:
    outputs = [torch.zeros(2 * SIZE) for _ in ranks]
    finish([r.start_all_gather(o, s) for r, o, s in zip(ranks, outputs, sources(2), strict=True)])
    assert all(torch.equal(o, torch.cat(sources(2))) for o in outputs)
    counts = [1, 0, 3]
    parts = [s[:n] for s, n in zip(sources(3), counts, strict=True)]
    outputs = [torch.zeros(4) for _ in ranks]
    finish([r.start_all_gather_v(o, s, counts) for r, o, s in zip(ranks, outputs, parts, strict=True)])
    assert all(torch.equal(o, torch.cat(parts)) for o in outputs)
    output = torch.zeros(2 * SIZE)
    finish([r.start_gather(output if i == 1 else None, sources(2)[i], 1) for i, r in enumerate(ranks)])
    assert torch.equal(output, torch.cat(sources(2)))


def test_shares(ranks: list[Survivors]) -> None:
    outputs = [torch.zeros(2) for _ in ranks]
    pairs = list(zip(ranks, outputs, sources(6), strict=True))
    finish([r.start_reduce_scatter(o, s, ReduceOp.SUM) for r, o, s in pairs])
    assert torch.equal(torch.cat(outputs), sum(sources(6)))
    finish([r.start_scatter(o, s if i == 2 else None, 2) for i, (r, o, s) in enumerate(pairs)])
    assert torch.equal(torch.cat(outputs), sources(6)[2])
    outputs = [torch.zeros(6) for _ in ranks]
    finish([r.start_all_to_all(o, s) for r, o, s in zip(ranks, outputs, sources(6), strict=True)])
    for rank, output in enumerate(outputs):
        assert torch.equal(output, torch.cat([s[2 * rank : 2 * rank + 2] for s in sources(6)]))


def test_unequal_sizes_and_dtypes_are_refused_on_every_rank(ranks: list[Survivors]) -> None:
    for odd in (torch.zeros(5), torch.zeros(4, dtype=torch.float64)):
        tensors = [torch.zeros(4), torch.zeros(4), odd]
        for works in (
            [r.start_all_reduce(t, ReduceOp.SUM) for r, t in zip(ranks, tensors, strict=True)],
            [r.start_broadcast(t, 0) for r, t in zip(ranks, tensors, strict=True)],
        ):
            for work in works:
                with pytest.raises(CommError, match=r"rank \d called .*, another .*"):
                    work.wait(5)


def test_a_failed_computation_reaches_every_rank(ranks: list[Survivors]) -> None:
    outputs, wrong = [torch.zeros(4) for _ in ranks], [torch.zeros(n) for n in (1, 2, 3)]
    works = [r.start_all_gather_v(o, s, [1, 0, 3]) for r, o, s in zip(ranks, outputs, wrong, strict=True)]
    for work in works:
        with pytest.raises(CommError, match="collective #0"):
            work.wait(5)
