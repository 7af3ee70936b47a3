"""What workers and shards of the parameter server say to each other: the same words as ever, checked once."""

from __future__ import annotations

import pytest
import torch

from paceline.errors import ProtocolError
from paceline.strategies.server.protocol import Presence, ServerOperation, ShardCopy, ShardExchange
from paceline.types import Message


def test_words_on_the_wire_stay_as_they_are() -> None:
    assert [operation.value for operation in ServerOperation] == ["exchange", "peek", "copy", "backup"]
    assert [presence.value for presence in Presence] == ["", "rest", "final"]
    exchange = ShardExchange(1, 7, 5, is_push=True, is_pull=False, presence=Presence.RESTING)
    assert list(exchange.message().header.items()) == [
        ("op", "exchange"),
        ("shard", 1),
        ("number", 7),
        ("version", 5),
        ("push", True),
        ("pull", False),
        ("state", "rest"),
    ]


@pytest.mark.parametrize("presence", list(Presence))
def test_an_exchange_is_read_as_it_was_written(presence: Presence) -> None:
    pieces = [torch.arange(3.0), torch.zeros(2)]
    exchange = ShardExchange(0, 3, 2, is_push=True, is_pull=True, presence=presence, pieces=pieces)
    read = ShardExchange.of(exchange.message())
    assert read == exchange
    assert all(torch.equal(a, b) for a, b in zip(read.pieces, pieces, strict=True))


def test_a_copy_ends_with_its_progress() -> None:
    progress = torch.tensor([[1, 2], [3, 4]])
    copy = ShardCopy.of(Message({"version": 9}, [torch.ones(2), torch.zeros(3), progress]))
    assert copy.version == 9 and len(copy.weights) == 2 and torch.equal(copy.progress, progress)


@pytest.mark.parametrize("header", [{}, {"op": "steal"}, {"op": 1}])
def test_an_unknown_operation_is_named_with_its_sender(header: dict[str, str | int]) -> None:
    with pytest.raises(ProtocolError, match="rank 2: parameter_server has no operation"):
        ServerOperation.of(2, Message(header))
