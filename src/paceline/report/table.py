"""A comparison as a table for the terminal."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from paceline.bench.rows import Comparison
from paceline.report import ledger, line_breaks, strategy_rows, work
from paceline.report.verdict import SPEED_TIE, amount, criteria, duration, noise, notes, passes, verdict

_WIDTH = 110
_LEAST_NAME = 16
"""Columns of the strategies' names, at least."""


def show(comparison: Comparison, console: Console | None = None) -> None:
    """Print the four criteria, bytes and waiting of every strategy; the winners are marked with *."""
    console = console or Console()
    is_stale = any("staleness_mean" in t.staleness for t in comparison.trials)
    text_width, console.width = console.width, max(console.width, _width(comparison, is_stale=is_stale))
    marked = [set(c.winners) for c in criteria(comparison)]
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1),
        title=f"{comparison.task}: {comparison.epochs:g} epochs of {comparison.train_samples} samples",
    )
    table.add_column("strategy", min_width=_LEAST_NAME, no_wrap=True)
    for head in (
        "workers",
        "samples/s",
        "s/epoch",
        "best acc. %\non val. set" if comparison.validation_samples else "best acc. %\non test set",
        f"acc. %\nat {duration(comparison.seconds_budget)}",
        f"acc. % at\n{passes(comparison.epochs_budget)}",
        "wire bytes\n/sample",
        "payload\n/sample",
        "waited",
        *(["staleness\nmean/max"] if is_stale else []),
    ):
        table.add_column(head, justify="right", no_wrap=True)
    for trial, row in zip(comparison.trials, comparison.results(), strict=True):
        cells = [
            f"{trial.samples_per_s:,.0f}",
            *(f"{100 * row[k]:.2f}" for k in ("best_accuracy", "accuracy_at_seconds", "accuracy_at_epochs")),
        ]
        starred = [
            f"[bold]{c}[/bold]*" if trial.strategy in won else f"{c} "
            for c, won in zip(cells, marked, strict=True)
        ]
        table.add_row(
            strategy_rows.in_lines(trial.strategy),
            str(trial.workers),
            starred[0],
            f"{trial.seconds_per_epoch:.3g}",
            *starred[1:],
            amount(trial.bytes_sent_per_sample),
            amount(trial.payload_bytes_per_sample),
            duration(trial.wait_s),
            *([_staleness(row)] if is_stale else []),
        )
    console.print(table)
    for more in (work.table(comparison), ledger.table(comparison)):
        if more is not None:
            console.print(more)
    console.width = text_width
    virtual = f"Seconds are virtual: a simulated cluster. {work.charging(comparison)} "
    clock = virtual if comparison.simulated else ""
    console.print(
        f"* best of its column, or within what may be chance: {100 * noise(comparison):.1f} points of "
        f"accuracy, {100 * SPEED_TIE:g} % of speed. {clock}Evaluation is off the clock.",
        style="dim",
    )
    for text in notes(comparison):
        console.print(text, style="yellow", markup=False)
    console.print(verdict(comparison), markup=False)


def _width(comparison: Comparison, *, is_stale: bool) -> int:
    """Columns of the table. A narrow terminal wraps lines; better than columns that lose their figures."""
    longest = max(len(line) for t in comparison.trials for line in line_breaks.lines(t.strategy))
    return _WIDTH + max(longest, _LEAST_NAME) + 14 * is_stale


def _staleness(row: dict[str, Any]) -> str:
    if row["staleness_mean"] is None:
        return "–"
    return f"{row['staleness_mean']:.1f}/{row['staleness_max']}"
