"""Measurements of this machine stay while new ones confirm them, so that comparisons repeat."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from paceline.bench import compute
from paceline.bench.calibration import Calibration, cache_file
from paceline.bench.compare import compare
from paceline.bench.compute import LinearCompute
from paceline.bench.rows import Comparison
from paceline.bench.virtual import VirtualCluster
from paceline.comm.simulated import work_costs

pytestmark = pytest.mark.contract

STRATEGIES = (
    "single",
    "all_reduce",
    "all_reduce(codec=powersgd(rank=2))",
    "local_sgd(period=4)",
    "parameter_server",
    "parameter_server(codec=error_feedback(codec=int8))",
    "gossip",
    "decentralized_threshold",
)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def test_what_is_near_is_confirmed_and_what_is_far_replaces_it() -> None:
    assert Calibration().confirmed("a", [1.0]) == [1.0]
    assert Calibration().confirmed("a", [1.2]) == [1.0] == Calibration().confirmed("a", [0.85])
    assert Calibration().confirmed("a", [1.3]) == [1.3] and Calibration().confirmed("a", [1.1]) == [1.3]
    assert Calibration().confirmed("a", [1.3, 2.0]) == [1.3, 2.0]


def test_what_another_process_kept_meanwhile_stays() -> None:
    one, two = Calibration(), Calibration()
    one.confirmed("a", [1.0])
    two.confirmed("b", [2.0])
    assert json.loads(cache_file().read_text()) == {"a": [1.0], "b": [2.0]}
    assert [p.name for p in cache_file().parent.iterdir()] == [cache_file().name], "nothing left behind"


@pytest.mark.parametrize(
    "text", ["", "[1]", "{", '{"a": 1}', '{"a": ["x"]}', '{"a": [-1]}', '{"a": [true]}', "\x00"]
)
def test_a_damaged_file_counts_as_empty(text: str) -> None:
    cache_file().parent.mkdir(parents=True)
    cache_file().write_text(text)
    assert Calibration().confirmed("a", [1.0]) == [1.0] == Calibration().confirmed("a", [1.1])


def test_a_file_that_cannot_be_written_is_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    assert Calibration(tmp_path / "file" / "costs.json").confirmed("a", [1.0]) == [1.0]


def test_two_comparisons_that_measure_differently_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """As two processes on a busy machine do: every measurement of the second is some percent off."""

    def run(factor: float) -> Comparison:
        monkeypatch.setattr(work_costs, "_measured", {})  # as in a new process
        monkeypatch.setattr(work_costs, "timed", lambda numel, rehearsal: 2e-5 * factor)
        monkeypatch.setattr(
            compute, "measure", lambda *_, **__: LinearCompute(1.5e-4 * factor, 1e-6 * factor)
        )
        return compare("digits", strategies=STRATEGIES, workers=8, epochs=1, virtual=VirtualCluster())

    first, second, other_machine = run(1.0), run(1.15), run(1.6)
    assert [t.curve for t in first.trials] == [t.curve for t in second.trials]
    assert first.costs == second.costs and first.simulated == second.simulated
    assert first.trials[0].seconds < other_machine.trials[0].seconds
