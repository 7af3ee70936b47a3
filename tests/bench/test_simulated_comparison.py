"""`paceline compare --simulate` from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from paceline.cli.main import app
from paceline.errors import ConfigError

pytestmark = pytest.mark.contract

STRATEGIES = "all_reduce,parameter_server(shards=2, staleness=softsync(c=2)+inverse),single"


def compare(path: Path, *extra: str) -> dict:
    arguments = [
        "compare",
        "digits",
        "--simulate",
        "4",
        "--epochs",
        "1",
        "--no-progress",
        "--json",
        str(path),
    ]
    result = CliRunner().invoke(app, [*arguments, *extra], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return json.loads(path.read_text())


def test_one_table_with_virtual_seconds_and_staleness(tmp_path: Path) -> None:
    extra = ["--strategies", STRATEGIES, "--compute", "pareto(shape=3)", "--network", "ethernet(gbit=1)"]
    first = compare(tmp_path / "a.json", *extra, "--trace", str(tmp_path / "traces"))
    rows = {row["strategy"].split("(")[0]: row for row in first["results"]}
    server = rows["parameter_server"]
    assert [row["workers"] for row in first["results"]] == [4, 4, 1]
    assert server["staleness_mean"] == pytest.approx(1.5, abs=0.2)
    assert server["staleness_max"] == len(server["staleness_histogram"]) - 1
    assert rows["all_reduce"]["staleness_mean"] is None
    for key in ("samples_per_s", "best_accuracy", "accuracy_at_seconds", "accuracy_at_epochs", "curve"):
        assert all(row[key] is not None for row in first["results"])
    # one worker needs four times as long for the whole batch, the others also wait for the slowest
    ratio = rows["single"]["seconds_per_epoch"] / rows["all_reduce"]["seconds_per_epoch"]
    assert 2 < ratio < 4
    assert len(list((tmp_path / "traces").glob("*.trace.json"))) == 3

    second = compare(tmp_path / "b.json", *extra)
    assert second["results"] == first["results"]


def test_record_and_replay_give_the_same_final_accuracy(tmp_path: Path) -> None:
    server = ["--strategies", "parameter_server(staleness=inverse)"]
    order = str(tmp_path / "order")
    recorded = compare(tmp_path / "a.json", *server, "--compute", "exponential", "--record", order)
    replayed = compare(tmp_path / "b.json", *server, "--compute", "constant", "--replay", order)
    assert recorded["results"][0]["curve"][-1]["accuracy"] == replayed["results"][0]["curve"][-1]["accuracy"]
    assert recorded["results"][0]["curve"][-1]["loss"] == replayed["results"][0]["curve"][-1]["loss"]
    assert recorded["results"][0]["parameters_sha256"] == replayed["results"][0]["parameters_sha256"]


@pytest.mark.parametrize(
    "extra",
    [["--compute", "gauss"], ["--network", "pigeons"], ["--faults", "explode"], ["--simulate", "0"]],
)
def test_wrong_conditions_are_refused(tmp_path: Path, extra: list[str]) -> None:
    with pytest.raises(ConfigError):
        compare(tmp_path / "a.json", *extra)
