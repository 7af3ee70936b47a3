"""`job.log`: what is in the files, after crashes too."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import paceline
from paceline.errors import ConfigError
from paceline.train.logs.formats import csv as csv_log
from paceline.train.logs.formats import jsonl as jsonl_log
from paceline.train.logs.logbook import Logbook, TrainingCounts, check_formats, plain

HEAD = ["epoch", "step", "seconds", "samples_per_s", "payload_bytes", "wait_s", "staleness"]


def train(folder: Path, strategy: str, log_to: str = "jsonl,csv") -> None:
    job = paceline.init(seed=0, log_dir=folder, log_to=log_to)
    torch.manual_seed(0)
    x = torch.randn(96, 8)
    data = TensorDataset(x, x[:, :3].argmax(1))
    model = torch.nn.Linear(8, 3)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    model, optimizer, loader = job.prepare(
        model, optimizer, DataLoader(data, batch_size=8), strategy=strategy, batch="per_worker"
    )
    for _ in job.epochs(2):
        for x, y in loader:
            loss = functional.cross_entropy(model(x), y)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            job.log(loss=loss)
    job.close()


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize("strategy", ["all_reduce", "parameter_server"])
def test_rows_by_step_and_by_rank(tmp_path: Path, strategy: str) -> None:
    paceline.simulate(train, num_workers=3, args=(tmp_path, strategy))
    steps = rows(tmp_path / "log.jsonl")
    assert [row["step"] for row in steps] == list(range(1, 9))
    assert [list(row) for row in steps] == [[*HEAD, "loss"]] * 8
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert all(row["payload_bytes"] > 0 for row in steps)
    assert all((row["staleness"] is None) == (strategy == "all_reduce") for row in steps)
    if strategy == "parameter_server":
        assert max(row["staleness"] for row in steps) > 0
    table = list(csv.DictReader((tmp_path / "log.csv").open()))
    assert [float(row["loss"]) for row in table] == [row["loss"] for row in steps]
    ranks = rows(tmp_path / "ranks.jsonl")
    assert [row["rank"] for row in ranks] == [0, 1, 2]
    assert [row["steps"] for row in ranks] == [8] * 3
    # What was logged step by step is what the rank sent while it trained (the rest closes the run).
    assert 0 < sum(row["payload_bytes"] for row in steps) <= ranks[0]["payload_bytes"]


@pytest.mark.xdist_group("processes")
def test_in_a_simulation_without_a_folder_no_rank_waits_for_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def body() -> list[Any]:
        job = paceline.init(seed=0)
        model = torch.nn.Linear(2, 1)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        loader = DataLoader(TensorDataset(torch.ones(8, 2)), batch_size=4)
        model, optimizer, loader = job.prepare(model, optimizer, loader, batch="global")
        for _ in job.epochs(1):
            for (x,) in loader:
                model(x).sum().backward()
                optimizer.step()
                job.log(loss=1.0)
        return job.gather_objects(job.rank)

    assert paceline.simulate(body, num_workers=2).results == [[0, 1], [0, 1]]
    (folder,) = (tmp_path / "runs").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == ["log.csv", "log.jsonl"]


def test_ranks_that_are_processes_hand_over_their_counts(tmp_path: Path) -> None:
    paceline.launch(train, num_workers=2, args=(tmp_path, "local_sgd(period=2)"))
    assert [(row["rank"], row["steps"]) for row in rows(tmp_path / "ranks.jsonl")] == [(0, 12), (1, 12)]
    assert len(rows(tmp_path / "log.jsonl")) == 12


SCRIPT = """
import sys, paceline
sys.path.insert(0, sys.argv[1])
from test_logging import train
train(sys.argv[2], "all_reduce", log_to="jsonl")
"""


@pytest.mark.xdist_group("processes")
def test_the_command_line_says_where(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    words = [sys.executable, "-m", "paceline.cli.main", "run", "--log-dir", str(tmp_path / "there")]
    words += ["--log-to", "csv", str(script), str(Path(__file__).parent), str(tmp_path / "ignored")]
    done = subprocess.run(words, check=False, capture_output=True, text=True, timeout=90, env={**os.environ})
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in (tmp_path / "there").iterdir()) == ["log.csv", "ranks.csv"]
    assert not (tmp_path / "ignored").exists()
    words[words.index("csv")] = "cvs"
    done = subprocess.run(words, check=False, capture_output=True, text=True, timeout=90)
    assert done.returncode == 2 and "Did you mean 'csv'?" in done.stderr


def test_half_a_line_is_cut_off(tmp_path: Path) -> None:
    for module, name in ((jsonl_log, "log.jsonl"), (csv_log, "log.csv")):
        first = module.open_log(tmp_path, "log", None)
        first.write({"step": 1, "loss": 0.5})
        first.write({"step": 2, "loss": 0.25})
        first.close()
        path = tmp_path / name
        path.write_bytes(path.read_bytes()[:-3])
        second = module.open_log(tmp_path, "log", 2)
        second.write({"step": 2, "loss": 0.125})
        second.close()
    assert rows(tmp_path / "log.jsonl") == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 0.125}]
    table = list(csv.DictReader((tmp_path / "log.csv").open()))
    assert table == [{"step": "1", "loss": "0.5"}, {"step": "2", "loss": "0.125"}]


def test_a_file_that_is_only_half_a_line(tmp_path: Path) -> None:
    (tmp_path / "log.csv").write_text("step,lo")
    log = csv_log.open_log(tmp_path, "log", None)
    log.write({"step": 1})
    log.close()
    assert (tmp_path / "log.csv").read_text() == "step\n1\n"


def test_new_columns_and_lines_in_values(tmp_path: Path) -> None:
    log = csv_log.open_log(tmp_path, "log", None)
    log.write({"step": 1, "note": "two\nlines"})
    log.write({"step": 2, "accuracy": 0.5})
    log.write({"step": 3})
    log.close()
    assert (tmp_path / "log.csv").read_text() == "step,note,accuracy\n1,two lines,\n2,,0.5\n3,,\n"
    assert [p.name for p in tmp_path.iterdir()] == ["log.csv"]


def test_json_stays_json(tmp_path: Path) -> None:
    log = jsonl_log.open_log(tmp_path, "log", None)
    log.write({"loss": float("nan"), "scale": float("inf")})
    log.close()
    assert rows(tmp_path / "log.jsonl") == [{"loss": "nan", "scale": "inf"}]


def test_plain_values() -> None:
    assert plain(torch.tensor([2.5])) == 2.5 and plain(None) is None and plain([1]) == "[1]"
    assert plain(torch.ones(2)) == "tensor([1., 1.])"


def test_columns_of_the_job_keep_their_meaning(tmp_path: Path) -> None:
    logbook = Logbook(0, 1, folder=tmp_path)
    with pytest.raises(ConfigError, match=r"job\.log\(step=…\): every row has a column of that name"):
        logbook.record(TrainingCounts(), {"step": 3})


def test_formats_are_checked() -> None:
    assert check_formats(None) == ("jsonl", "csv")
    assert check_formats("csv,csv,jsonl") == ("csv", "jsonl")
    with pytest.raises(ConfigError, match="Did you mean 'tensorboard'"):
        Logbook(0, 1, formats="tensorbord")


def test_tensorboard_reads_it_back(tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    paceline.simulate(train, num_workers=2, args=(tmp_path, "all_reduce", "tensorboard"))
    events = event_accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    losses = events.Scalars("loss")
    assert [event.step for event in losses] == list(range(1, 13))
    assert losses[-1].value < losses[0].value
    assert {"ranks/0/wait_s", "ranks/1/payload_bytes"} <= set(events.Tags()["scalars"])
    assert {p.suffix for p in tmp_path.iterdir()}.isdisjoint({".csv", ".jsonl"})


def test_without_tensorboard_it_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"pip install 'paceline\[tensorboard\]'"):
        paceline.simulate(train, num_workers=1, args=(tmp_path, "all_reduce", "tensorboard"))
