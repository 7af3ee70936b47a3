"""`paceline compare` and `paceline strategies`, end to end on tiny runs."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from paceline import registry
from paceline.bench.compare import compare
from paceline.bench.training import evaluation_steps
from paceline.bench.virtual import VirtualCluster
from paceline.errors import ConfigError, WorkerFailed
from paceline.report.page import render
from paceline.report.table import show

pytestmark = pytest.mark.xdist_group("processes")

KEYS = {
    "strategy",
    "workers",
    "samples_per_s",
    "seconds_per_epoch",
    "best_accuracy",
    "accuracy_at_seconds",
    "accuracy_at_epochs",
    "bytes_sent_per_sample",
    "wait_s",
    "curve",
}
TASK = """
import torch, paceline
def build():
    model = torch.nn.Linear(2, 2)
    data = torch.utils.data.TensorDataset(torch.zeros(8, 2), torch.zeros(8, dtype=torch.long))
    def loss(outputs, targets):
        {body}
    return paceline.Task(model, torch.optim.SGD(model.parameters(), lr=10.0), data, data, loss, batch_size=4)
"""


def paceline(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "paceline.cli.main", *arguments],
        check=False,
        capture_output=True,
        text=True,
        timeout=200,
    )


@pytest.fixture(scope="module")
def ran(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("compare")
    done = paceline(
        *("compare", "digits", "--workers", "2", "--epochs", "3", "--seed", "7", "--fabric", "torch"),
        *("--strategies", "single,all_reduce,local_sgd(period=8, average_optimizer=true)", "--no-progress"),
        *("--json", str(folder / "deep" / "out.json"), "--html", str(folder / "out.html")),
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads((folder / "deep" / "out.json").read_text())
    return {**found, "stdout": done.stdout, "stderr": done.stderr, "html": (folder / "out.html").read_text()}


def test_json_has_every_strategy_in_order_with_every_key(ran: dict[str, Any]) -> None:
    rows = ran["results"]
    assert [r["strategy"] for r in rows] == [
        "single",
        "all_reduce",
        "local_sgd(period=8, average_optimizer=true)",
    ]
    assert [r["workers"] for r in rows] == [1, 2, 2]
    assert all(set(r) >= KEYS for r in rows)
    assert ran["seed"] == 7 and ran["epochs_budget"] == 1.5 and ran["hardware"]["cores"] >= 1


def on_the_line(curve: list[dict[str, float]], key: str, budget: float) -> float:
    """The accuracy at `budget`, between the evaluations around it."""
    return float(np.interp(budget, [p[key] for p in curve], [p["accuracy"] for p in curve]))


def test_criteria_follow_from_the_curves(ran: dict[str, Any]) -> None:
    fastest = min(r["curve"][-1]["seconds"] for r in ran["results"])
    assert ran["seconds_budget"] == fastest
    for row in ran["results"]:
        curve = row["curve"]
        assert curve[0]["epoch"] == 0 and curve[-1]["epoch"] == 3 and curve[-1]["samples"] == 3 * 1437
        assert any(p["epoch"] == pytest.approx(1.5, abs=0.02) for p in curve)
        assert row["best_accuracy"] == max(p["accuracy"] for p in curve) > 0.8
        assert row["accuracy_at_seconds"] == pytest.approx(on_the_line(curve, "seconds", fastest))
        assert row["accuracy_at_epochs"] == pytest.approx(on_the_line(curve, "epoch", 1.5))
        assert row["samples_per_s"] == pytest.approx(curve[-1]["samples"] / curve[-1]["seconds"])
        assert row["seconds_per_epoch"] == pytest.approx(curve[-1]["seconds"] / 3)
        assert "loss" in curve[0]


def test_conditions_are_equal(ran: dict[str, Any]) -> None:
    starts = {(r["curve"][0]["accuracy"], r["curve"][0]["loss"]) for r in ran["results"]}
    assert len({a for a, _ in starts}) == 1, "the same initial weights"
    single, all_reduce, local = ran["results"]
    for a, b in zip(single["curve"], all_reduce["curve"], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=0.05, abs=0.02), "one big batch, divided"
    assert single["bytes_sent_per_sample"] == 0
    model_bytes = 4 * single["model_parameters"]
    steps = 3 * 45
    last = all_reduce["curve"][-1]
    assert last["payload_bytes"] == pytest.approx(2 * model_bytes * steps, rel=0.01), "two workers"
    assert last["bytes_sent"] == pytest.approx(2 * model_bytes * steps, rel=0.01), "2(P-1)/P of it each: all"
    assert 0 < local["bytes_sent_per_sample"] < all_reduce["bytes_sent_per_sample"] / 3


def test_table_and_seed_are_printed(ran: dict[str, Any]) -> None:
    assert "seed 7" in ran["stderr"]
    for word in ("all_reduce", "single", "samples/s", "waited", "average_optimizer"):
        assert word in ran["stdout"]
    assert re.search(r"distribut", ran["stdout"], re.IGNORECASE)


def test_page_is_self_contained_and_escaped(ran: dict[str, Any]) -> None:
    page = ran["html"]
    markup = re.sub(r"(<script[^>]*>).*?(</script>)", r"\1\2", page, flags=re.DOTALL)
    assert "<script" in markup
    assert not re.search(r"\b(src|href|url)\b\s*[=(]|@import|https?://", markup), "nothing may be fetched"
    assert "plotly.js v" in page[:100_000], "the library itself is in the page"
    for heading in ("Accuracy over time", "Accuracy over epochs", "Accuracy over bytes sent", "Who won"):
        assert heading in page
    assert page.count("Plotly.newPlot(") >= 3


def test_task_files_that_fail(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text("def build():\n    raise RuntimeError('no data today')\n")
    done = paceline("compare", str(path), "--workers", "2")
    assert done.returncode == 2
    assert "build() raised" in done.stderr and "no data today" in done.stderr
    assert "src/paceline" not in done.stderr
    path.write_text(TASK.format(body="raise RuntimeError('bad loss')"))
    with pytest.raises(WorkerFailed, match=r"strategy all_reduce: rank \d of 2.*") as caught:
        compare(str(path), strategies=["all_reduce"], workers=2)
    assert "bad loss" in str(caught.value)


def test_a_users_task_and_its_numbers(tmp_path: Path) -> None:
    path = tmp_path / "mine.py"
    path.write_text(TASK.format(body="return torch.nn.functional.cross_entropy(outputs, targets)"))
    found = compare(
        str(path), strategies=["all_reduce"], workers=1, epochs=1, seconds_budget=1e-9, epochs_budget=1
    )
    (row,) = found.results()
    first = row["curve"][0]["accuracy"]
    assert row["accuracy_at_seconds"] == pytest.approx(first, abs=1e-3), "before the first step"
    assert row["accuracy_at_epochs"] == row["curve"][-1]["accuracy"] == 1.0
    assert found.batch_size == 4 and found.train_samples == 8


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"strategies": ["sinlge"]}, "Did you mean 'single'"),
        ({"strategies": ["local_sgd(perod=3)"]}, "perod"),
        ({"strategies": []}, "at least one"),
        ({"workers": 0}, "--workers: at least 1"),
        ({"epochs": 0}, "--epochs: at least 1"),
        ({"batch_size": 1}, "too small for 2 workers"),
        ({"epochs": 2, "epochs_budget": 3.0}, "more than the 2 epochs"),
        ({"seconds_budget": 0.0}, "--seconds-budget: a number above 0"),
        ({"learning_rate": -1.0}, "--learning-rate: a number above 0"),
        ({"data": Path("x")}, "takes no data"),
    ],
)
def test_mistakes_are_found_before_training(arguments: dict[str, Any], said: str) -> None:
    def never(*_: Any) -> None:
        raise AssertionError("training began")

    with pytest.raises(ConfigError, match=said):
        compare("digits", **{"strategies": ["single"], "on_trial": never, **arguments})


@pytest.mark.parametrize(("steps", "evaluations"), [(45, 1), (45, 4), (3, 4), (1, 10), (938, 6)])
def test_evaluations_are_spread_and_include_the_end(steps: int, evaluations: int) -> None:
    found = evaluation_steps(steps, evaluations)
    assert max(found) == steps and min(found) >= 1
    assert len(found) == min(evaluations, steps) or steps < evaluations


def test_strategies_are_listed_with_defaults_and_advice() -> None:
    done = paceline("strategies", "--json")
    told = json.loads(done.stdout)
    rows = {r["name"]: r for r in told["strategies"]}
    policies = {r["name"]: r for r in told["staleness_policies"]}
    assert policies["polynomial"]["defaults"] == {"a": 0.5} and "softsync" in policies
    assert sorted(rows) == registry.names("paceline.strategies")
    assert rows["local_sgd"]["defaults"]["codec"] is None and rows["gossip"]["defaults"]["period"] == 1
    assert all(r["advice"] and "\n" not in r["advice"] for r in rows.values())
    printed = paceline("strategies").stdout
    for name, row in rows.items():
        entry = re.split(rf"^{name}\n", printed, flags=re.MULTILINE)[1]
        assert row["advice"] in " ".join(re.split(r"\n(?=\S)", entry)[0].split())


def test_bytes_by_cause_are_in_results_page_and_table() -> None:
    done = compare(
        "digits",
        strategies=[
            "all_reduce",
            "decentralized_threshold(tau=0.001, entropy=true)",
            "all_reduce(codec=int8)",
        ],
        workers=3,
        epochs=1,
        progress=False,
        virtual=VirtualCluster("constant", "ethernet(gbit=1)"),
    )
    plain, sparse, dense = done.results()
    assert "codec" not in plain
    for row in (sparse, dense):
        found = row["codec"]
        causes = [found[key] for key in ("payload_bytes", "index_bytes", "header_bytes")]
        assert sum(causes) == found["encoded_bytes"] < found["raw_bytes"] / 3
        assert causes[2] == 32 * found["encodes"] and found["encodes"] % 3 == 0, "all three workers count"
        assert found["encode_s"] > 0 and found["extra_memory_bytes"] >= 0
    # Every payload with a hit goes to the two others; the rest of the traffic is agreement at the end.
    assert sparse["codec"]["index_bytes"] > 0 and dense["codec"]["index_bytes"] == 0
    assert sparse["codec"]["bits_per_hit"] >= 0.99 * sparse["codec"]["entropy_bound_bits_per_hit"] > 1
    page = render(done).partition("<h2>Bytes by cause</h2>")[2].partition("</table>")[0]
    assert page.count("<tr>") == 3 and "decentralized_threshold" in page and "codec=int8" in page
    hits = f"{sparse['codec']['bits_per_hit']:.1f} ({sparse['codec']['entropy_bound_bits_per_hit']:.1f})"
    assert hits in page
    console = Console(record=True, file=io.StringIO())
    show(done, console)
    assert hits in console.export_text()
