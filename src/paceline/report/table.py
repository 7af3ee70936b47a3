"""A comparison as a table for the terminal."""

from __future__ import annotations

from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from paceline.bench.rows import Comparison
from paceline.report import ledger
from paceline.report.verdict import amount, criteria, duration, verdict

_WIDTH = 100
_NAME_WIDTH = 48


def show(comparison: Comparison, console: Console | None = None) -> None:
    """Print the four criteria, bytes and waiting of every strategy; the winners are marked with *."""
    console = console or Console()
    is_stale = any("staleness_mean" in t.staleness for t in comparison.trials)
    # A narrow terminal wraps lines; better than columns that lose their figures.
    longest = max(len(t.strategy) for t in comparison.trials)
    console.width = max(console.width, _WIDTH + min(longest, _NAME_WIDTH) + 14 * is_stale)
    marked = [set(c.winners) for c in criteria(comparison)]
    table = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1),
        title=f"{comparison.task}: {comparison.epochs:g} epochs of {comparison.train_samples} samples",
    )
    table.add_column("strategy", min_width=16, max_width=_NAME_WIDTH, overflow="fold")
    for head in (
        "workers",
        "samples/s",
        "s/epoch",
        "best\nacc. %",
        f"acc. %\nat {duration(comparison.seconds_budget)}",
        f"acc. % at\n{comparison.epochs_budget:g} epochs",
        "bytes sent\n/sample",
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
            trial.strategy,
            str(trial.workers),
            starred[0],
            f"{trial.seconds_per_epoch:.3g}",
            *starred[1:],
            amount(trial.bytes_sent_per_sample),
            duration(trial.wait_s),
            *([_staleness(row)] if is_stale else []),
        )
    console.print(table)
    bytes_by_cause = ledger.table(comparison)
    if bytes_by_cause is not None:
        console.print(bytes_by_cause)
    clock = "Seconds are virtual: a simulated cluster. " if comparison.simulated else ""
    console.print(f"* best of its column. {clock}Evaluation is off the clock.", style="dim")
    console.print(verdict(comparison))


def _staleness(row: dict[str, Any]) -> str:
    if row["staleness_mean"] is None:
        return "–"
    return f"{row['staleness_mean']:.1f}/{row['staleness_max']}"
