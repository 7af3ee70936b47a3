"""What a communicator for a GPU does around messages and groups; the meta device stands for the GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from paceline.comm import device_messages, torch_fabric
from paceline.comm.messages.reply import Deferred
from paceline.train.saving import persistence
from paceline.types import Message

GPU = torch.device("meta")


def message() -> Message:
    return Message({"op": "push"}, [torch.ones(3), torch.arange(2), torch.ones(2, dtype=torch.uint8)])


def devices(tensors: Any) -> list[str]:
    return [t.device.type for t in tensors]


def test_handlers_get_numbers_on_the_device_and_counts_on_the_cpu() -> None:
    seen: list[Message] = []
    handle = device_messages.handler_on(lambda src, m: seen.append(m), GPU)
    assert handle(1, message()) is None
    assert devices(seen[0].tensors) == ["meta", "cpu", "cpu"]
    assert seen[0].header == {"op": "push"}


def test_replies_do_so_too() -> None:
    inner = Deferred()
    reply = device_messages.ReplyOnDevice(inner, GPU)
    outcomes: list[Any] = []
    reply.then(outcomes.append)
    assert not reply.is_done()
    reply.set(message())
    assert reply.is_done()
    assert devices(reply.wait(1.0).tensors) == ["meta", "cpu", "cpu"]
    assert devices(outcomes[0].tensors) == ["meta", "cpu", "cpu"]
    failing = device_messages.ReplyOnDevice(Deferred(), GPU)
    failing.fail(ValueError("no"))
    failing.then(outcomes.append)
    assert isinstance(outcomes[1], ValueError)


@pytest.mark.parametrize(
    ("cards", "shared"),
    [
        ([["a", "gpu 0"], ["a", "gpu 1"]], False),
        ([["a", "gpu 0"], ["a", "gpu 0"]], True),
        ([["a", "gpu 0"], ["b", "gpu 0"]], False),
        ([["a", "gpu 0"], ["b", "gpu 1"], ["b", "gpu 1"]], True),
    ],
)
def test_ranks_notice_that_they_share_a_gpu(
    cards: list[list[str]], shared: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="gpu 0"))
    shown: list[Any] = []

    def exchange(key: str, own: object, *, timeout_s: float) -> list[list[str]]:
        shown.append((key, own))
        return cards

    meeting: Any = SimpleNamespace(rank=0, size=len(cards), hosts=["a", "b"], exchange=exchange)
    assert torch_fabric._share_a_gpu(meeting, torch.device("cuda", 0), timeout_s=1.0) is shared
    assert shown == [("gpu", ["a", "gpu 0"])]


def test_a_loaded_state_goes_to_the_device_of_the_model() -> None:
    state = {"clock": 3, "residual": [torch.ones(2), {"momentum": torch.ones(1), "seen": torch.arange(3)}]}
    placed = persistence._placed(state, GPU)
    assert placed["clock"] == 3
    assert placed["residual"][0].device == GPU
    assert placed["residual"][1]["momentum"].device == GPU
    assert placed["residual"][1]["seen"].device.type == "cpu"
