"""Strategies, codecs, algorithms and policies from a user's file: on the command line and in workers."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from paceline import collectives, plugins, registry
from paceline.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
ALGORITHM = """
from paceline.collectives.ring import OPERATIONS, build, cost, supports
"""
POLICY = """
from paceline.strategies.base.staleness_policy import StalenessPolicy

class Half(StalenessPolicy):
    '''Halves late updates.'''
    advice = "An example."
    def scale(self, staleness):
        return 0.5 if staleness else 1.0
"""
CODEC = """
from paceline.codecs.int8 import Int8

class Mine(Int8):
    '''int8 in blocks of 64.'''
    def __init__(self) -> None:
        super().__init__(block=64)
"""
SCRIPT = """
import torch
import paceline

job = paceline.init()
model = torch.nn.Linear(2, 1)
model, optimizer = job.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))
for _ in range(4):
    model(torch.ones(3, 2)).mean().backward()
    optimizer.step()
    optimizer.zero_grad()
print("trained by", job.strategy.name)
job.close()
"""


def example() -> str:
    """The file that CONTRIBUTING.md shows."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    return re.findall(r"```python\n# every_other.py\n(.*?)```", text, re.DOTALL)[0]


def command(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "paceline.cli.main", *words],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def test_an_algorithm_is_verified_by_its_file(tmp_path: Path) -> None:
    (tmp_path / "zigzag.py").write_text(ALGORITHM)
    done = command("schedule", "verify", "./zigzag.py", "--ranks", "2..4", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "all correct" in done.stdout


@pytest.mark.distributed
def test_workers_see_the_plug_in(tmp_path: Path) -> None:
    (tmp_path / "every_other.py").write_text(example())
    (tmp_path / "train.py").write_text(SCRIPT)
    words = ["run", "-n", "2", "--plugin", "every_other.py", "--strategy", "every_other", "train.py"]
    done = command(*words, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("trained by every_other") == 2


def test_each_kind_takes_its_place(tmp_path: Path) -> None:
    from paceline import codecs
    from paceline.strategies.base import staleness_policy, strategy

    for name, text in (("half", POLICY), ("mine", CODEC), ("every_other", example()), ("zigzag", ALGORITHM)):
        (tmp_path / f"{name}.py").write_text(text)
    assert sorted(plugins.load(str(tmp_path))) == ["every_other", "half", "mine", "zigzag"]
    assert strategy.make("every_other").name == "every_other"
    assert staleness_policy.make("half").scale(1) == 0.5
    assert type(codecs.make("mine")).__name__ == "Mine"
    assert collectives.build("zigzag", "all_reduce", 4).num_ranks == 4
    assert plugins.files() == tuple(sorted(str(p) for p in tmp_path.glob("*.py")))


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("ring.py", ALGORITHM, "'ring' exists already in paceline.collectives; rename"),
        ("zigzag.py", "def build(:\n", r"raised while it was read[\s\S]*SyntaxError"),
        ("zigzag.py", "1 / 0\n", r"zigzag.py\"?, line 1[\s\S]*ZeroDivisionError"),
        ("zigzag.py", "", "defines none of the kinds"),
        ("two words.py", ALGORITHM, "a file NAME.py expected"),
        ("two.py", CODEC + CODEC.split("\n\n")[1].replace("Mine", "Other"), "one Codec a file expected"),
    ],
)
def test_what_is_wrong_with_a_file(name: str, text: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ConfigError, match=reason):
        plugins.load(str(tmp_path / name))


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such file"):
        plugins.load(str(tmp_path / "zigzag.py"))


def test_an_alias_is_a_name_too(tmp_path: Path) -> None:
    alias = next(iter(collectives.aliases()))
    (tmp_path / f"{alias}.py").write_text(ALGORITHM)
    with pytest.raises(ConfigError, match="exists already"):
        plugins.load(str(tmp_path / f"{alias}.py"))


def test_an_entry_point_is_a_plug_in(monkeypatch: pytest.MonkeyPatch) -> None:
    def declared(value: str) -> None:
        entry = importlib.metadata.EntryPoint("elsewhere", value, "paceline.algorithms")
        monkeypatch.setattr(registry, "_entry_points", lambda package: {"elsewhere": entry})

    declared("paceline.collectives.ring")
    assert registry.load("paceline.collectives", "elsewhere", kind="algorithm").__name__.endswith(".ring")
    for wrong in ("no_such_module", "paceline.collectives.ring:build"):
        declared(wrong)
        with pytest.raises(ConfigError, match="entry point elsewhere"):
            registry.load("paceline.collectives", "elsewhere", kind="algorithm")
