"""`paceline schedule`: outputs, files, errors, and that torch stays out."""

from __future__ import annotations

import json
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from paceline import collectives
from paceline.cli.main import make_app
from paceline.errors import ConfigError

RUN = CliRunner()


def run_json(*arguments: str) -> Any:
    result = RUN.invoke(make_app(), ["schedule", *arguments, "--json"])
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def run_text(*arguments: str) -> str:
    result = RUN.invoke(make_app(), ["schedule", *arguments])
    assert result.exit_code == 0, result.output
    return result.stdout


def test_list_names_every_algorithm_with_its_claims() -> None:
    rows = run_json("list")
    assert [r["name"] for r in rows] == sorted(collectives.algorithms())
    for row in rows:
        assert row["operations"]
        assert all(row[key] for key in ("summary", "source", "cost", "ranks")), row
    text = run_text("list")
    assert all(r["name"] in text for r in rows)
    assert "also: pairwise_exchange" in text


def test_list_by_operation() -> None:
    assert all("broadcast" in r["operations"] for r in run_json("list", "--operation", "broadcast"))


def test_simulate_gives_the_documented_keys() -> None:
    got = run_json("simulate", "ring", "--operation", "all_reduce", "--ranks", "16", "--bytes", "100MB")
    assert got["steps"] == 30
    assert got["bytes_sent_per_rank"] == pytest.approx(2 * 15 / 16 * 1e8)
    assert got["time_s"] == pytest.approx(got["closed_form_time_s"], rel=0.01)
    assert got["num_bytes"] == 100_000_000


def test_simulate_sixteen_thousand_ranks() -> None:
    for name in ("ring", "halving_doubling"):
        got = run_json("simulate", name, "--ranks", "16384", "--bytes", "100000000")
        assert got["time_s"] == pytest.approx(got["closed_form_time_s"], rel=0.01)


def test_simulate_conditions_and_per_rank_results() -> None:
    base = run_json("simulate", "ring", "--ranks", "8", "--per-rank")
    assert len(base["finish_s"]) == len(base["sent_bytes"]) == 8
    for extra in (["--late", "3:0.5"], ["--straggler", "3:4"], ["--slow-link", "0-1:10"]):
        slow = run_json("simulate", "ring", "--ranks", "8", *extra)
        assert slow["time_s"] > base["time_s"]
        assert slow["closed_form_time_s"] is None


def test_algorithms_that_know_hosts_hear_of_the_topology() -> None:
    """On 4 hosts of 2 the NICs carry half as much as with any other grouping."""
    net = "cluster(hosts=4, local=2, gbit=1)"
    known = run_json("simulate", "hybrid", "--topology", net, "--bytes", "64MiB")
    wrong = run_json("simulate", "hybrid(hosts=2)", "--topology", net, "--bytes", "64MiB")
    assert known["ranks"] == 8
    assert known["time_s"] < wrong["time_s"]


def test_simulate_text_and_trace(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "t.json"
    text = run_text("simulate", "chain", "--operation", "broadcast", "--ranks", "5", "--trace", str(path))
    assert "closed form" in text
    events = json.loads(path.read_text())["traceEvents"]
    assert sum(e["ph"] == "X" for e in events) == 2 * 4 * 8  # a send and a receive per segment and hop


def test_show_writes_picture_page_and_trace(tmp_path: Path) -> None:
    got = run_json("show", "ring", "--ranks", "4", "--output", str(tmp_path))
    assert set(got["files"]) == {"svg", "html", "trace"}
    svg = Path(got["files"]["svg"])
    assert svg.parent == tmp_path
    root = ElementTree.fromstring(svg.read_text())
    assert root.tag.endswith("svg")
    assert len([e for e in root.iter() if e.get("class") == "arrow"]) == 6 * 4
    words = " ".join(e.text or "" for e in root.iter())
    assert "rank 3" in words
    assert "step 6" in words
    page = Path(got["files"]["html"]).read_text()
    assert "<svg" in page
    assert "src=" not in page.split("</style>")[0]
    trace = json.loads(Path(got["files"]["trace"]).read_text())
    flows = [e for e in trace["traceEvents"] if e["ph"] in "sf"]
    assert len(flows) == 2 * 6 * 4
    assert len(got["steps"]) == 7  # the load and six steps
    assert got["steps"][1][0]["kind"] == "reduce"


def test_show_prints_steps(tmp_path: Path) -> None:
    text = run_text("show", "ring", "--ranks", "3", "--output", str(tmp_path))
    assert "step 1" in text
    assert "step 4" in text
    assert "reduce rank 0 output[2]" in text


def test_show_writes_only_the_chosen_file(tmp_path: Path) -> None:
    target = tmp_path / "p.svg"
    got = run_json("show", "ring", "--ranks", "3", "--svg", str(target), "--output", str(tmp_path / "no"))
    assert got["files"] == {"svg": str(target)}
    assert list(tmp_path.iterdir()) == [target]


@pytest.mark.parametrize("p", [1, 4])
def test_everything_can_be_shown(p: int, tmp_path: Path) -> None:
    for name, module in collectives.algorithms().items():
        for operation in module.OPERATIONS:
            if not operation.endswith("_v") and collectives.supports(name, operation, p):
                run_json(
                    *("show", name, "--operation", operation, "--ranks", str(p)), "--output", str(tmp_path)
                )


def test_verify() -> None:
    got = run_json("verify", "binomial_tree", "--ranks", "1..4")
    assert got["ok"]
    assert got["ranks"] == [1, 2, 3, 4]
    assert got["programs"] == 4 * (1 + 2 + 3 + 4)  # four rooted operations, every root
    assert got["failures"] == []
    assert run_json("verify", "--all", "--operation", "barrier", "--ranks", "2,5")["ok"]
    assert run_json("verify", "ring_chunked(segments=3)", "--operation", "all_reduce", "--ranks", "3")["ok"]
    assert "all correct" in run_text("verify", "ring", "--ranks", "2..3")


def test_verify_fails_for_a_wrong_plug_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ring whose first step sends the wrong chunk is dropped into a folder, found, and rejected."""
    import paceline.collectives.ring as ring

    source = Path(ring.__file__).read_text()
    wrong = source.replace("turn(p, -1 - t)", "turn(p, -1 - t + (t == 0))")
    assert wrong != source
    (tmp_path / "wrong_ring.py").write_text(wrong)
    monkeypatch.setattr(collectives, "__path__", [*collectives.__path__, str(tmp_path)])
    result = RUN.invoke(make_app(), ["schedule", "verify", "wrong_ring", "--ranks", "3", "--json"])
    sys.modules.pop("paceline.collectives.wrong_ring", None)
    assert result.exit_code == 1
    got = json.loads(result.stdout)
    assert not got["ok"]
    assert got["failures"][0]["reason"]


def test_compare_finds_latency_and_bandwidth_regimes() -> None:
    got = run_json(
        *("compare", "--ranks", "64", "--topology", "ethernet(gbit=1)", "--sizes", "8,64MB"),
        *("--algorithms", "recursive_doubling,ring,halving_doubling"),
    )
    assert [r["fastest"] for r in got["rows"]] == ["recursive_doubling", "halving_doubling"]
    (crossover,) = got["crossovers"]
    assert (crossover["from"], crossover["to"]) == ("recursive_doubling", "halving_doubling")
    # lg P (α + Sβ + Sγ) = 2 lg P·α + (P−1)/P·S(2β + γ)
    alpha, beta, gamma = 50e-6, 8e-9, 1e-10
    share = 63 / 64
    want = 6 * alpha / (6 * (beta + gamma) - share * (2 * beta + gamma))
    assert crossover["num_bytes"] == pytest.approx(want, rel=0.02)
    for row in got["rows"]:
        assert row["time_s"] == min(row["times_s"].values())


def test_compare_prints_a_table_and_skips_what_cannot() -> None:
    text = run_text("compare", "--ranks", "6", "--sizes", "1kB,1MB")
    assert "fastest" in text
    skipped = run_json("compare", "--ranks", "6", "--algorithms", "bcube(base=4),ring")["skipped"]
    assert list(skipped) == ["bcube(base=4)"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["simulate", "rign"], "ring"),
        (["simulate", "ring", "--operation", "broadcast", "--ranks", "4"], "ring"),
        (["simulate", "ring", "--operation", "all_redcue", "--ranks", "4"], "all_reduce"),
        (["simulate", "ring"], "--ranks"),
        (["simulate", "ring(segments=2)", "--ranks", "4"], "segments"),
        (["simulate", "ring", "--ranks", "4", "--bytes", "much"], "bytes"),
        (["simulate", "ring", "--ranks", "4", "--topology", "moon"], "topology"),
        (["simulate", "ring", "--ranks", "4", "--topology", "dgx1"], "8 ranks"),
        (["simulate", "ring", "--ranks", "4", "--late", "5"], "--late"),
        (["simulate", "ring", "--ranks", "4", "--late", "9:1"], "rank 9"),
        (["simulate", "all_pairs", "--ranks", "16384"], "peers in one step; at most"),
        (
            ["simulate", "bruck", "--operation", "all_to_all", "--ranks", "16384"],
            "peers in one step; at most",
        ),
        (["simulate", "bcube(base=4)", "--ranks", "6"], "6 ranks"),
        (["show", "ring", "--ranks", "500"], "at most"),
        (["verify"], "--all"),
        (["verify", "ring", "--all"], "--all"),
        (["verify", "ring", "--ranks", "5..2"], "5..2"),
        (["verify", "ring", "--operation", "gather"], "all_gather"),
        (["compare", "--ranks", "4", "--sizes", "1kB,x"], "bytes"),
        (["list", "--operation", "sum"], "operation"),
    ],
)
def test_mistakes_are_explained(arguments: list[str], says: str) -> None:
    result = RUN.invoke(make_app(), ["schedule", *arguments])
    assert isinstance(result.exception, ConfigError), result.output
    assert says in str(result.exception)


def test_commands_do_not_import_torch_and_mistakes_exit_with_2(tmp_path: Path) -> None:
    code = """
import sys
from paceline.cli.main import main
sys.argv = ["paceline", "schedule", *sys.argv[1:]]
try:
    main()
finally:
    assert not {m for m in sys.modules if m.split(".")[0] in ("torch", "scipy", "networkx")}
"""

    def start(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", code, *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=tmp_path, check=False)

    for arguments in (
        ("simulate", "ring", "--ranks", "4", "--json"),
        ("verify", "ring", "--ranks", "1..3"),
        ("compare", "--ranks", "4", "--sizes", "1MB"),
    ):
        done = start(*arguments)
        assert done.returncode == 0, done.stderr
    wrong = start("simulate", "rign", "--ranks", "4")
    assert wrong.returncode == 2
    assert "Did you mean 'ring'" in wrong.stderr
    assert "Traceback" not in wrong.stderr
