"""Cutting a worker's output into lines, and keeping its traceback for the end."""

from __future__ import annotations

import io

import pytest

from paceline.launchers.processes.console import Console
from paceline.launchers.processes.failure import error_line
from paceline.launchers.processes.output import LineReader, TracebackKeeper


def lines(*chunks: bytes) -> list[tuple[str, bool]]:
    reader = LineReader()
    found = [item for chunk in chunks for item in reader.feed(chunk)]
    return [*found, *reader.finish()]


@pytest.mark.parametrize(
    ("chunks", "expected"),
    [
        ([b"one\ntwo\n"], [("one", True), ("two", True)]),
        ([b"on", b"e\ntw", b"o"], [("one", True), ("two", True)]),
        ([b"dos\r\n"], [("dos", True)]),
        ([b"\r10%", b"\r20%", b"\n"], [("10%", False), ("20%", False), ("20%", True)]),
        ([b"\r10%\r", b"\r\x1b[K\r", b"done\n"], [("10%", False), ("", False), ("done", True)]),
        ([b"\r10%\r", b"\r\x1b[K\r"], [("10%", False), ("", False)]),
        ([b"\xff\n"], [("\ufffd", True)]),
    ],
)
def test_lines_and_rewritten_lines(chunks: list[bytes], expected: list[tuple[str, bool]]) -> None:
    assert lines(*chunks) == expected


def test_a_line_without_end_does_not_grow_for_ever() -> None:
    assert len(lines(b"x" * 200_000)[0][0]) == 200_000
    reader = LineReader()
    assert [whole for _, whole in reader.feed(b"y" * 100_000)] == [True]


def test_traceback_is_held_until_it_is_known_to_be_the_last() -> None:
    keeper = TracebackKeeper()
    assert keeper.add("before", 0.0) == ["before"]
    traceback = ["Traceback (most recent call last):", "  File x", "ValueError: boom"]
    for line in traceback:
        assert keeper.add(line, 1.0) == []
    assert keeper.add("[rank1]:[W1122 02:25:42.553 x.cpp:2] shutting down", 1.1) == [
        "[rank1]:[W1122 02:25:42.553 x.cpp:2] shutting down"
    ]
    assert keeper.stale(1.0 + keeper.PATIENCE_S / 2) == []
    assert keeper.traceback == traceback and keeper.began_s == 1.0
    assert keeper.stale(1.5 + keeper.PATIENCE_S) == traceback
    assert keeper.traceback == traceback, "remembered in case the process dies of it"
    assert keeper.add("life goes on", 9.0) == ["life goes on"]
    assert keeper.traceback == []


def test_error_line_of_chained_tracebacks() -> None:
    text = (
        "Traceback (most recent call last):\n  File a\nKeyError: 'x'\n\nDuring handling …\n\n"
        "Traceback (most recent call last):\n  File b\n    ^^^\nValueError: first\nsecond line"
    )
    assert error_line(text.splitlines()) == "ValueError: first"


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_console_draws_bars_and_colours_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    out, err = io.StringIO(), io.StringIO()
    plain = Console(out, err)
    plain.bar(0, "50%")
    plain.line(3, "hello")
    assert (out.getvalue(), err.getvalue(), plain.bar_columns) == ("[3] hello\n", "", 0)
    screen = Terminal()
    shown = Console(screen, screen)
    assert shown.bar_columns > 0
    shown.bar(0, "50%")
    shown.line(1, "hello")
    assert screen.getvalue().endswith("50%"), "the bar stays below the line"
    assert "\x1b[33m[1]\x1b[0m hello\n" in screen.getvalue()
    monkeypatch.setenv("NO_COLOR", "1")
    shown.line(1, "plain")
    assert "[1] plain\n" in screen.getvalue()
