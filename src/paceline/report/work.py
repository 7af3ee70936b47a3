"""What codecs, servers and outer steps took of virtual time, as a part of the page and as a table."""

from __future__ import annotations

from rich.table import Table

from paceline.bench.rows import Comparison, Trial
from paceline.report import strategy_rows
from paceline.report.verdict import duration

_HEADS = (
    "encode\nper worker",
    "decode\nper worker",
    "outer steps,\ndifferences",
    "server\nper worker",
    "busiest\nserver",
    "training",
)
_HINT = """Virtual seconds of work beside training, each as long as it takes on one core of this machine (the
median of several runs, timed once). Servers work beside the workers, one request after the other. The costs
are in the JSON file, and --codec-cost FILE takes them again."""


def charging(comparison: Comparison) -> str:
    """One sentence on whether such work takes virtual time; "" for real workers."""
    if comparison.simulated is None:
        return ""
    if comparison.charges_work:
        return "Codecs, servers and outer steps take as long as on one core of this machine."
    return "Codecs, servers and outer steps take no virtual time, which flatters them."


def section(comparison: Comparison) -> str:
    """A heading and a table in HTML; nothing if no strategy worked beside training."""
    return strategy_rows.section(
        comparison, _rows(comparison), title="Work beside training", hint=_HINT, heads=_HEADS
    )


def table(comparison: Comparison) -> Table | None:
    """The same for the terminal."""
    title = "work beside training, virtual seconds"
    return strategy_rows.table(comparison, _rows(comparison), title=title, heads=_HEADS)


def _rows(comparison: Comparison) -> dict[int, list[str]]:
    return {i: _cells(trial) for i, trial in enumerate(comparison.trials) if trial.work_s}


def _cells(trial: Trial) -> list[str]:
    spent = [trial.work_s.get(kind, 0.0) for kind in ("encode", "decode", "arithmetic", "server")]
    cells = [duration(s) if s else "–" for s in (*spent, trial.busiest_server_s)]
    return [*cells, duration(trial.seconds)]
