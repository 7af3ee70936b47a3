"""Where the bytes of encoded strategies went, by cause, as a part of the page and as a table."""

from __future__ import annotations

from rich.table import Table

from paceline.bench.rows import Comparison, Trial
from paceline.report import strategy_rows
from paceline.report.verdict import amount, duration

_HEADS = (
    "encoded",
    "of\nfp32",
    "payload",
    "index",
    "header",
    "bits per hit\n(bound)",
    "encode time\nper worker",
    "extra memory\nper worker",
)
_HINT = """What the codecs of these strategies made, all workers together. A payload counts once, however many
workers it is sent to. Payload: values, signs and scales; index: which elements they belong to. The bound is
the entropy of independent hits, which no code can beat on average. Encode time is what this machine really
spent, also where seconds of training are virtual; extra memory holds residuals and factors."""


def section(comparison: Comparison) -> str:
    """A heading and a table in HTML; nothing if no strategy has a codec."""
    return strategy_rows.section(
        comparison, _rows(comparison), title="Bytes by cause", hint=_HINT, heads=_HEADS
    )


def table(comparison: Comparison) -> Table | None:
    """The same for the terminal."""
    title = "bytes by cause, all workers together"
    return strategy_rows.table(comparison, _rows(comparison), title=title, heads=_HEADS)


def _rows(comparison: Comparison) -> dict[int, list[str]]:
    return {i: _cells(trial) for i, trial in enumerate(comparison.trials) if trial.codec}


def _cells(trial: Trial) -> list[str]:
    codec = trial.codec
    hits = "–"
    if codec["hits"]:
        hits = f"{codec['bits_per_hit']:.1f} ({codec['entropy_bound_bits_per_hit']:.1f})"
    return [
        amount(codec["encoded_bytes"]),
        f"{100 * codec['encoded_bytes'] / max(codec['raw_bytes'], 1):.2f} %",
        *(amount(codec[key]) for key in ("payload_bytes", "index_bytes", "header_bytes")),
        hits,
        duration(codec["encode_s"] / trial.workers),
        amount(codec["extra_memory_bytes"] / trial.workers),
    ]
