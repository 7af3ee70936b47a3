"""Long strategies are broken between names, in the terminal and on pages."""

from __future__ import annotations

import dataclasses
import io
import re

import pytest
from rich.console import Console

from paceline.bench.rows import Comparison, Point, Trial
from paceline.report import line_breaks
from paceline.report.page import render
from paceline.report.table import show

LONG = [
    "streaming_diloco(period=100, fragments=4, codec=topk(density=0.01), outer_lr=0.7)",
    "streaming_diloco(period=100,fragments=4,codec=topk(density=0.01),outer_lr=0.7)",
    "parameter_server(staleness=softsync(c=2)+inverse(plus_one=true),codec=error_feedback(codec=onebit))",
    "decentralized_threshold(tau=0.001)",
    "single",
]
WORDS = re.compile(r"[\w.=]+")


@pytest.mark.parametrize("strategy", LONG)
@pytest.mark.parametrize("width", [10, 24, 48, 200])
def test_lines_hold_the_whole_string_and_cut_no_name(strategy: str, width: int) -> None:
    lines = line_breaks.lines(strategy, width)
    assert "".join(lines).replace(" ", "") == strategy.replace(" ", "")
    assert WORDS.findall("\n".join(lines)) == WORDS.findall(strategy)
    longest_piece = max(len(p.rstrip()) for p in line_breaks.pieces(strategy))
    assert max(map(len, lines)) <= max(width, longest_piece)


def test_html_is_escaped_and_may_break() -> None:
    assert line_breaks.html("a(b=1, c=<x>)") == "a(<wbr>b=1, <wbr>c=&lt;x&gt;)"


def comparison() -> Comparison:
    curve = (Point(0, 0.0, 0, 0, 0.1), Point(1, 1.0, 1000, 10, 0.9))
    trials = tuple(Trial(s, curve=curve, workers=2, wait_s=0.0) for s in LONG)
    return Comparison(
        task="digits",
        trials=trials,
        epochs=1,
        batch_size=32,
        threads=1,
        seed=0,
        train_samples=1000,
        test_samples=360,
        seconds_budget=1.0,
        epochs_budget=0.5,
    )


@pytest.mark.parametrize("columns", [80, 200])
def test_a_table_cuts_no_name(columns: int) -> None:
    console = Console(file=io.StringIO(), record=True, width=columns)
    show(comparison(), console)
    words = set(WORDS.findall(console.export_text()))
    for strategy in LONG:
        assert set(WORDS.findall(strategy)) <= words


def test_a_narrow_terminal_cuts_no_figure_beside_short_names() -> None:
    console = Console(file=io.StringIO(), record=True, width=80)
    named = [dataclasses.replace(t, strategy="a") for t in comparison().trials]
    show(dataclasses.replace(comparison(), trials=tuple(named)), console)
    table = console.export_text().partition("* best of its column")[0]
    assert "wire bytes" in table and "…" not in table


def test_text_below_the_table_fits_the_terminal() -> None:
    console = Console(file=io.StringIO(), record=True, width=80)
    show(comparison(), console)
    text = console.export_text().partition("* best of its column")[2]
    assert text and max(map(len, text.splitlines()[1:])) <= 80


def test_a_page_lets_the_browser_break() -> None:
    page = render(comparison())
    assert page.count(line_breaks.html(LONG[1])) >= 2, "in the table, and as a winner or a method"
    assert "<br>".join(line_breaks.lines(LONG[1])) in page.replace(r"\u003c", "<").replace(r"\u003e", ">")
