"""Commands that list something fit the terminal, and 80 columns where there is none."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from paceline import registry
from paceline.cli import entries
from paceline.cli.main import make_app

LISTS = [["strategies"], ["codecs"], ["schedule", "list"], ["errors"], ["errors", "PL04"]]


def printed(command: list[str]) -> list[str]:
    done = CliRunner().invoke(make_app(command[0]), command)
    assert done.exit_code == 0, done.output
    return done.output.splitlines()


@pytest.mark.parametrize("command", LISTS, ids=" ".join)
@pytest.mark.parametrize("columns", [None, 60, 200])
def test_a_list_fits(command: list[str], columns: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", str(columns or ""))
    lines = printed(command)
    assert max(map(len, lines)) <= (columns or 80)
    if columns == 200:
        assert max(map(len, lines)) > 80, "room is used"


@pytest.mark.parametrize(
    ("command", "packages"),
    [
        ("strategies", ["paceline.strategies", "paceline.strategies.staleness"]),
        ("codecs", ["paceline.codecs"]),
    ],
)
def test_no_name_is_cut(command: str, packages: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "20")
    lines = printed([command])
    assert all(name in lines for package in packages for name in registry.names(package))


def test_words_longer_than_a_line_stay_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "12")
    assert entries.wrapped("short a-word-longer-than-a-line").splitlines() == [
        "short",
        "a-word-longer-than-a-line",
    ]
