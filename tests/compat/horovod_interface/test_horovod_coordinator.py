"""The negotiation of the Horovod interface: any order of submission, one order of execution."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.compat.horovod.coordinator import Coordinator
from paceline.compat.horovod.request import (
    Request,
    Response,
    pack,
    unpack_requests,
    unpack_responses,
)
from paceline.errors import ProtocolError
from paceline.types import Message


def reduce_of(name: str, numel: int = 4, dtype: str = "float32", **options: object) -> Request:
    return Request(name, "allreduce", [[numel]], [dtype], **options)


def coordinator(ranks: int, fusion_bytes: int = 1 << 20) -> Coordinator:
    return Coordinator({0: list(range(ranks))}, fusion_bytes=fusion_bytes)


def test_nothing_starts_before_every_rank_has_asked() -> None:
    c = coordinator(3)
    assert c.submit(0, [reduce_of("a")], 0.0) == []
    assert c.submit(2, [reduce_of("a")], 0.0) == []
    assert c.submit(1, [reduce_of("a")], 0.0) == [Response([reduce_of("a")])]


@given(st.integers(1, 5), st.integers(1, 12), st.integers(0, 2**32 - 1), st.integers(0, 64))
def test_any_order_performs_each_name_once(ranks: int, count: int, seed: int, fusion_bytes: int) -> None:
    rng = random.Random(seed)
    c = coordinator(ranks, fusion_bytes)
    orders = [rng.sample(range(count), count) for _ in range(ranks)]
    performed: list[str] = []
    while any(orders):
        rank = rng.choice([r for r in range(ranks) if orders[r]])
        take = rng.randint(1, len(orders[rank]))
        names, orders[rank] = orders[rank][:take], orders[rank][take:]
        for response in c.submit(rank, [reduce_of(str(n), 4) for n in names], 0.0):
            assert not response.error
            assert len(response.requests) == 1 or 16 * len(response.requests) <= fusion_bytes
            performed += [r.name for r in response.requests]
    assert sorted(performed) == sorted(str(n) for n in range(count))


def test_only_equal_dtypes_and_operations_are_fused() -> None:
    c = coordinator(1)
    requests = [
        reduce_of("a"),
        reduce_of("b"),
        reduce_of("c", dtype="float16"),
        reduce_of("d", dtype="float16", op="Max"),
        reduce_of("e", dtype="float16", op="Max", prescale=0.5),
        Request("f", "allgather", [[2]], ["float16"]),
    ]
    groups = [[r.name for r in response.requests] for response in c.submit(0, requests, 0.0)]
    assert groups == [["a", "b"], ["c"], ["d"], ["e"], ["f"]]


@pytest.mark.parametrize(
    "other",
    [reduce_of("a", 5), reduce_of("a", dtype="int32"), reduce_of("a", op="Max"), Request("a", "broadcast")],
)
def test_disagreement_is_an_error_that_names_both_ranks(other: Request) -> None:
    c = coordinator(2)
    c.submit(0, [reduce_of("a")], 0.0)
    (response,) = c.submit(1, [other], 0.0)
    assert "rank 0" in response.error
    assert "rank 1" in response.error


def test_stalled_names_the_missing_ranks_once_and_can_give_up() -> None:
    c = coordinator(4)
    c.submit(1, [reduce_of("late")], 0.0)
    c.submit(3, [reduce_of("late")], 1.0)
    assert c.stalled(5.0, 10.0) == []
    (sentence,) = c.stalled(11.0, 10.0)
    assert "late" in sentence
    assert "ranks 0, 2" in sentence
    assert c.stalled(12.0, 10.0) == []
    (response,) = c.fail_stalled(60.0, 30.0)
    assert "ranks 0, 2" in response.error


def test_joined_ranks_count_as_having_asked() -> None:
    c = coordinator(3)
    assert c.submit(0, [Request("join", "join")], 0.0) == []
    c.submit(1, [reduce_of("a")], 0.0)
    assert [r.name for r in c.submit(2, [reduce_of("a")], 0.0)[0].requests] == ["a"]
    # A name that waits only for a rank that now joins becomes ready.
    c.submit(1, [reduce_of("b")], 0.0)
    assert [r.name for r in c.submit(2, [Request("join", "join")], 0.0)[0].requests] == ["b"]
    (last,) = c.submit(1, [Request("join", "join")], 0.0)
    assert last.last_joined == 1


def test_allgather_with_a_joined_rank_is_refused() -> None:
    c = coordinator(2)
    c.submit(0, [Request("join", "join")], 0.0)
    (response,) = c.submit(1, [Request("g", "allgather", [[2]], ["float32"])], 0.0)
    assert "joined" in response.error


def test_messages_survive_packing() -> None:
    requests = [reduce_of("a"), Request("s", "alltoall", [[3, 2]], ["int64"], splits=[1, 2])]
    assert unpack_requests(pack(requests)) == requests
    responses = [Response(requests, rows=[[1], [2]]), Response([requests[0]], error="no", last_joined=2)]
    assert unpack_responses(pack(responses)) == responses


@given(st.binary(max_size=60))
def test_garbage_is_a_protocol_error(data: bytes) -> None:
    torch = pytest.importorskip("torch")
    message = Message({}, [torch.frombuffer(bytearray(data or b"x"), dtype=torch.uint8)])
    for unpack in (unpack_requests, unpack_responses):
        try:
            assert unpack(message) == []
        except ProtocolError:
            pass
