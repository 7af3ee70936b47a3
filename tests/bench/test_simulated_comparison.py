"""`paceline compare --simulate` from the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from paceline.cli.main import make_app
from paceline.errors import ConfigError
from paceline.plugins import load as load_plugin

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
    result = CliRunner().invoke(make_app(), [*arguments, *extra], catch_exceptions=False)
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


SLOW_CODEC = """
import time

import torch

from paceline.codecs.kernel.codec import Codec


class Drowsy(Codec):
    def max_encoded_bytes(self, numel):
        return 4 * numel

    def encode(self, x, state, *, out=None):
        return self.encode_with_residual(x, None, state, out=out)

    def encode_with_residual(self, x, residual, state, *, out=None):
        time.sleep(0.003)
        payload = x.detach().clone().view(torch.uint8)
        return payload if out is None else out.copy_(payload)

    def decode(self, payload, out, *, accumulate=False):
        values = payload.clone().view(torch.float32)
        out.add_(values) if accumulate else out.copy_(values)

    def set_options(self, *, checksum=False, use_reference=False):
        pass
"""


def test_a_slow_codec_makes_its_row_slower_by_its_cost(tmp_path: Path) -> None:
    (tmp_path / "drowsy_codec.py").write_text(SLOW_CODEC)
    load_plugin(tmp_path / "drowsy_codec.py")
    extra = ["--strategies", "all_reduce,all_reduce(codec=drowsy_codec)", "--compute", "constant"]
    free, charged = (
        compare(tmp_path / f"{cost}.json", *extra, "--codec-cost", cost) for cost in ("none", "measured")
    )
    steps = 45
    plain, slow = charged["results"]
    assert plain["work_s"] == {} and plain["curve"] == free["results"][0]["curve"]
    # Each step every worker encodes 4 chunks and a sum.
    assert slow["work_s"]["encode"] >= steps * 5 * 0.003
    later = slow["curve"][-1]["seconds"] - free["results"][1]["curve"][-1]["seconds"]
    # The last chunk is shorter, so that its owner has less to do than the mean.
    assert later == pytest.approx(slow["work_s"]["encode"] + slow["work_s"]["decode"], rel=0.02)
    assert slow["parameters_sha256"] == free["results"][1]["parameters_sha256"], "in step: only time differs"
    assert free["costs"] == {} and any(name.startswith("encode drowsy") for name in charged["costs"])


def test_the_written_costs_repeat_a_run_bit_for_bit(tmp_path: Path) -> None:
    strategies = "parameter_server(codec=error_feedback(codec=int8)),decentralized_threshold,diloco"
    extra = ["--strategies", strategies, "--compute", "linear(step_s=0.001, sample_s=1e-05)"]
    first = compare(tmp_path / "a.json", *extra)
    # As slow as 30 times: another process would not have measured these.
    first["costs"] = {k: {n: 30 * s for n, s in sizes.items()} for k, sizes in first["costs"].items()}
    (tmp_path / "a.json").write_text(json.dumps(first))
    again = [compare(tmp_path / f"{i}.json", *extra, "--codec-cost", str(tmp_path / "a.json")) for i in "12"]
    rows = [[(r["curve"], r["work_s"], r["parameters_sha256"]) for r in run["results"]] for run in again]
    assert rows[0] == rows[1] and again[0]["costs"] == again[1]["costs"] == first["costs"]
    for row, before in zip(again[0]["results"], first["results"], strict=True):
        assert row["curve"][-1]["seconds"] > before["curve"][-1]["seconds"]


def test_the_table_and_the_page_say_what_was_charged(tmp_path: Path) -> None:
    arguments = ["compare", "digits", "--simulate", "2", "--epochs", "1", "--no-progress", "--html"]
    strategies = ["--strategies", "all_reduce(codec=int8),parameter_server"]
    for cost, said in (
        ("measured", "take as long as on one core of this machine"),
        ("none", "take no virtual time, which flatters them"),
    ):
        given = [*arguments, str(tmp_path / "page.html"), *strategies, "--codec-cost", cost]
        result = CliRunner().invoke(make_app(), given, catch_exceptions=False)
        page = (tmp_path / "page.html").read_text()
        assert said in " ".join(result.output.split()) and said in page
        assert ("work beside training, virtual seconds" in result.output) == (cost == "measured")
        assert ("<h2>Work beside training</h2>" in page) == (cost == "measured")
        assert ("its codec took no virtual time" in " ".join(result.output.split())) == (cost == "none")


@pytest.mark.parametrize(
    "extra",
    [
        ["--compute", "gauss"],
        ["--network", "pigeons"],
        ["--faults", "explode"],
        ["--simulate", "0"],
        ["--codec-cost", "no such file"],
    ],
)
def test_wrong_conditions_are_refused(tmp_path: Path, extra: list[str]) -> None:
    with pytest.raises(ConfigError):
        compare(tmp_path / "a.json", *extra)
