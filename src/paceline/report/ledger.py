"""Where the bytes of encoded strategies went, by cause, as a part of the page and as a table."""

from __future__ import annotations

from html import escape

from rich import box
from rich.table import Table

from paceline.bench.rows import Comparison, Trial
from paceline.report import charts
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
the entropy of independent hits, which no code can beat on average. Encode time is that of this machine;
extra memory holds residuals and factors."""


def section(comparison: Comparison) -> str:
    """A heading and a table in HTML; nothing if no strategy has a codec."""
    rows = []
    for i, trial in enumerate(comparison.trials):
        if trial.codec:
            name = f'<span class="dot" style="background:{charts.colour(i)}"></span>{escape(trial.strategy)}'
            rows.append(f"<tr><td>{name}</td>{''.join(f'<td>{c}</td>' for c in _cells(trial))}</tr>")
    if not rows:
        return ""
    head = "".join(f"<th>{h}</th>".replace("\n", "<br>") for h in ("strategy", *_HEADS))
    return (
        f'<h2>Bytes by cause</h2><p class="hint">{_HINT}</p><div class="scroll"><table><thead><tr>{head}</tr>'
        f"</thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def table(comparison: Comparison) -> Table | None:
    """The same for the terminal."""
    if not any(trial.codec for trial in comparison.trials):
        return None
    made = Table(box=box.SIMPLE_HEAD, padding=(0, 1), title="bytes by cause, all workers together")
    made.add_column("strategy", min_width=16, max_width=48, overflow="fold")
    for head in _HEADS:
        made.add_column(head, justify="right", no_wrap=True)
    for trial in comparison.trials:
        if trial.codec:
            made.add_row(trial.strategy, *_cells(trial))
    return made


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
