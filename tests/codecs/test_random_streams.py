"""Stochastic rounding draws other numbers on every worker, shard and tensor, also after a checkpoint."""

from __future__ import annotations

import torch

from paceline import codecs
from paceline.codecs.kernel.random_stream import use_stream
from paceline.strategies.server.encoding import PullEncoder, PushEncoder

CODEC = "int8(stochastic=true)"


def all_different(tensors: list[torch.Tensor]) -> bool:
    return len({t.numpy().tobytes() for t in tensors}) == len(tensors)


def test_every_worker_and_shard_pushes_with_noise_of_its_own() -> None:
    x = torch.linspace(-1, 1, 300)
    pushed = [
        payload
        for rank in range(3)
        for shard in range(2)
        for payload in PushEncoder(codecs.make(CODEC), rank).encode(shard, [x, x])
    ]
    assert all_different(pushed)


def test_every_shard_answers_every_worker_with_noise_of_its_own() -> None:
    x, zero = torch.linspace(-1, 1, 300), torch.zeros(300)
    answers = []
    for shard in range(3):
        encoder = PullEncoder(codecs.make(CODEC), shard, [zero, zero], range(2))
        for rank in range(2):
            answers += encoder.encode(rank, [x, x]) or []
    assert len(answers) == 12
    assert all_different(answers)


def test_the_mean_over_workers_has_less_noise_than_one() -> None:
    x = torch.rand(4096, generator=torch.Generator().manual_seed(1))
    decoded = torch.zeros(32, 4096)
    for rank in range(32):
        codec = codecs.make(CODEC)
        codec.decode(PushEncoder(codec, rank).encode(0, [x])[0], decoded[rank])
    one, mean = (decoded[0] - x).square().mean(), (decoded.mean(0) - x).square().mean()
    assert mean < one / 20  # 1/32 for independent noise


def test_a_state_of_another_rank_does_not_bring_its_noise() -> None:
    x = torch.linspace(-1, 1, 300)
    first, second = PushEncoder(codecs.make(CODEC), 0), PushEncoder(codecs.make(CODEC), 1)
    first.encode(0, [x])
    second.states = {name: dict(state) for name, state in first.states.items()}
    assert all_different([first.encode(0, [x])[0], second.encode(0, [x])[0]])


def test_streams_are_numbers_that_a_checkpoint_keeps() -> None:
    seen = set()
    for place in [("push", 0, 1), ("push", 1, 0), ("pull", 0, 1), ("push", 10), ("push", 1, 0, 0)]:
        state: dict[str, object] = {}
        use_stream(state, *place)
        seen.add(state["stream"])
    assert len(seen) == 5
    assert all(isinstance(s, int) and 0 <= s < 2**63 for s in seen)
