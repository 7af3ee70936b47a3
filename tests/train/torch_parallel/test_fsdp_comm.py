"""FSDP2 with codecs: the losses of FSDP alone, with a fraction of the bytes."""

from __future__ import annotations

import fsdp_bodies as bodies
import pytest
from c10d_ranks import run
from torch import nn

import paceline
from paceline import core
from paceline.errors import ConfigError

pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group("processes")]
BACKEND = "gloo" if core.missing else "paceline"


def mean(losses: list[float]) -> float:
    return sum(losses[-20:]) / 20


@pytest.mark.parametrize("backend", ["gloo", BACKEND])
@pytest.mark.parametrize("size", [2, 4])
def test_int8_trains_as_uncompressed(size: int, backend: str) -> None:
    if backend == "gloo" and size == 4:
        pytest.skip("one of both sizes is enough for gloo")
    found = run(size, bodies.compared, "int8", "int8", 200, backend=backend)[0]
    assert mean(found["plain"]) < 0.8 * found["plain"][0], "it must learn something"
    assert abs(mean(found["ours"]) / mean(found["plain"]) - 1) < 0.01
    assert found["ratio"] > 3.5
    assert found["stats"]["encoded_bytes"] < found["stats"]["raw_bytes"] / 3.5


def test_one_bit_with_error_feedback_learns() -> None:
    found = run(2, bodies.compared, "error_feedback(codec=onebit(block=32))", None, 200)[0]
    assert mean(found["ours"]) < 0.9 * found["ours"][0]
    assert found["stats"]["extra_memory_bytes"] > 0


@pytest.mark.parametrize("size", [2, 3])
def test_payloads_that_lose_nothing_change_nothing(size: int) -> None:
    run(size, bodies.exact)


def test_the_state_continues() -> None:
    run(2, bodies.interrupted)


@pytest.mark.parametrize("across", ["int8", "powersgd(rank=4)"])
def test_codec_between_replicas(across: str) -> None:
    plain, ours, spread = run(4, bodies.hybrid, across)[0]
    assert spread == 0.0, "replicas are equal, bit for bit"
    assert abs(mean(ours) / mean(plain) - 1) < 0.03


@pytest.mark.parametrize("across", ["local_sgd(period=5)", "diloco(period=10)"])
def test_models_are_averaged_between_replicas(across: str) -> None:
    plain, ours, spread = run(4, bodies.hybrid, across)[0]
    assert spread == 0.0, "replicas are equal in the end, bit for bit"
    assert mean(ours) < mean(plain) + 0.3 * (plain[0] - mean(plain)), (
        "it learns most of what every step learns"
    )


def test_an_interrupted_training_with_diloco_between_replicas_goes_on() -> None:
    run(4, bodies.interrupted_diloco)


def test_what_would_be_wrong_in_silence_is_refused() -> None:
    run(4, bodies.refusals)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"gradients": "threshold(density=0.01)"}, "size of a payload depends on the values"),
        ({"gradients": "powersgd(rank=2)"}, "not a codec for single tensors"),
        ({"gradients": "int9"}, "int8"),
        ({"gradients": "int8", "weights": "error_feedback(codec=int8)"}, "error feedback has no use"),
        ({"gradients": "int8", "across": "int8"}, "belong together"),
        ({"gradients": "int8", "across": "gossip", "replicas": object()}, "averages models all together"),
    ],
)
def test_wrong_arguments(arguments: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        paceline.fsdp_comm(**arguments)


def test_a_model_that_is_not_sharded_is_refused() -> None:
    with pytest.raises(ConfigError, match="fully_shard first"):
        paceline.fsdp_comm("int8").install(nn.Linear(2, 2))
