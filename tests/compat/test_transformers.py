"""Hugging Face's Trainer, the real one, over our backend and with our strategies on two ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers", reason="needs the extra transformers")

import transformers_bodies as bodies

import paceline
from paceline.compat.transformers import PacelineCallback
from paceline.errors import ConfigError

pytestmark = [pytest.mark.engines, pytest.mark.xdist_group("processes")]


def launched(folder: Path, *arguments: Any, body: Any = bodies.train) -> list[dict[str, Any]]:
    results: list[dict[str, Any]] = paceline.launch(body, num_workers=2, args=(str(folder), *arguments))
    return results


def test_the_backend_gives_the_losses_of_gloo(tmp_path: Path) -> None:
    gloo, _ = launched(tmp_path / "gloo", "gloo", body=bodies.over_the_backend)
    ours, other = launched(tmp_path / "ours", "paceline", body=bodies.over_the_backend)
    assert ours["backend"] == "paceline" and len(gloo["losses"]) == 6
    assert ours["losses"] == pytest.approx(gloo["losses"], rel=1e-6)
    assert ours["model"] == other["model"]


def test_all_reduce_by_the_callback_is_what_ddp_computes(tmp_path: Path) -> None:
    settings = {"gradient_accumulation_steps": 2, "max_grad_norm": 0.5, "max_steps": 8}
    theirs, _ = launched(tmp_path / "ddp", None, settings)
    ours, other = launched(tmp_path / "ours", "all_reduce", settings)
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-5)
    assert ours["model"] == pytest.approx(theirs["model"], rel=1e-4, abs=1e-6)
    assert ours["model"] == other["model"]
    assert ours["stats"]["minibatches"] == 8 and ours["stats"]["samples"] == 8 * 16


def test_local_sgd_sends_an_eighth(tmp_path: Path) -> None:
    every, _ = launched(tmp_path / "every", "all_reduce")
    some, other = launched(tmp_path / "some", "local_sgd(period=8)")
    sent = [run["stats"]["training"]["payload_bytes"] for run in (every, some)]
    assert sent[0] == pytest.approx(8 * sent[1], rel=0.02)
    assert some["losses"][-1] < some["losses"][0] and some["model"] == other["model"]


@pytest.mark.parametrize("strategy", ["local_sgd(period=3)", "diloco(period=4)"])
def test_a_checkpoint_of_the_trainer_goes_on_where_it_was(tmp_path: Path, strategy: str) -> None:
    """At step 10 the replicas differ."""
    for whole, resumed in paceline.launch(bodies.resumed, num_workers=2, args=(str(tmp_path), strategy)):
        assert resumed["model"] == whole["model"]


def test_wrong_strategies_are_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="unknown strategy"):
        PacelineCallback("local_sdg(period=8)")
    with pytest.raises(ConfigError, match="training has not begun"):
        _ = PacelineCallback("local_sgd(period=8)").job
