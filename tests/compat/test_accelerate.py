"""Accelerate, the real one, with our strategies on two ranks."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("accelerate", reason="needs the extra accelerate")

import accelerate_bodies as bodies
import torch

import paceline
from paceline.compat.accelerate import prepare
from paceline.errors import ConfigError

pytestmark = [pytest.mark.engines, pytest.mark.xdist_group("processes")]


def test_state_is_saved_and_resumed(tmp_path: Path) -> None:
    """Period 3 does not divide the 8 steps: the ranks differ when the state is saved."""
    first, second = paceline.launch(
        bodies.resumes, num_workers=2, args=(str(tmp_path / "state"), "local_sgd(period=3)")
    )
    assert first["whole"] == second["whole"] == first["resumed"] == second["resumed"]
    assert first["replica"] != second["replica"] and first["consensus"] == second["consensus"]
    assert first["unchanged"] and second["unchanged"]
    assert first["samples"] == 128


def test_all_reduce_is_what_ddp_computes() -> None:
    """With clipping, and gradients accumulated over two batches."""
    for result in paceline.launch(bodies.beside_ddp, num_workers=2, args=(2,)):
        assert result["ours"] == pytest.approx(result["theirs"], rel=1e-5, abs=1e-7)


def test_what_cannot_be_prepared() -> None:
    model = torch.nn.Linear(1, 1)
    with pytest.raises(ConfigError, match=r"one torch\.nn.Module expected, got 2"):
        prepare(object(), model, torch.nn.Linear(1, 1))
    with pytest.raises(ConfigError, match="unknown strategy"):
        prepare(object(), model, strategy="al_reduce")
