"""Measured collectives as a table for the terminal and as one self-contained page of pictures."""

from __future__ import annotations

from html import escape
from pathlib import Path

import plotly.graph_objects as go
from rich.console import Console
from rich.table import Table

from paceline.bench.collectives import CollectiveTiming, Result
from paceline.report.charts import colour

_WIDTH = 120


def size_text(num_bytes: int) -> str:
    """4 B, 32 KiB, 1 MiB."""
    for unit, factor in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if num_bytes >= factor:
            return f"{num_bytes / factor:g} {unit}"
    return f"{num_bytes} B"


def time_text(seconds: float) -> str:
    """Microseconds or milliseconds, three digits."""
    return f"{seconds * 1e6:.3g} us" if seconds < 1e-3 else f"{seconds * 1e3:.4g} ms"


def label(row: CollectiveTiming) -> str:
    """Library, with fabric and buffers where they tell Paceline's rows apart."""
    if row.library != "paceline":
        return row.library
    return f"paceline {row.fabric}" + (" allocated" if row.buffers == "allocated" else "")


def show(result: Result, console: Console | None = None) -> None:
    """Print one line per operation, number of ranks and size, one column per library."""
    console = console or Console()
    if not console.is_terminal:
        console.width = max(console.width, _WIDTH)
    labels = list(dict.fromkeys(label(r) for r in result.rows))
    table = Table(title="Seconds per call (median of blocks, slowest rank); * the fastest")
    for head in ("operation", "ranks", "size"):
        table.add_column(head, justify="left" if head == "operation" else "right", no_wrap=True)
    for head in labels:
        table.add_column(head, justify="right")
    cells: dict[tuple[str, int, int], dict[str, float]] = {}
    for row in result.rows:
        cells.setdefault((row.operation, row.ranks, row.num_bytes), {})[label(row)] = row.median_s
    for (operation, ranks, num_bytes), times in cells.items():
        best = min(times.values())
        texts = [
            time_text(times[n]) + ("*" if times[n] == best else "") if n in times else "" for n in labels
        ]
        table.add_row(operation, str(ranks), "" if operation == "barrier" else size_text(num_bytes), *texts)
    console.print(table)


def write(result: Result, path: Path) -> None:
    """Write the page to `path`; folders are made."""
    from plotly.offline import get_plotlyjs

    pictures = "".join(
        f"<h2>{escape(operation)}, {ranks} ranks</h2>{_picture(result, operation, ranks)}"
        for operation, ranks in dict.fromkeys((r.operation, r.ranks) for r in result.rows)
    )
    hardware = ", ".join(f"{k} {v}" for k, v in result.hardware.items())
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Collectives compared</title>
<style>{Path(__file__).with_name("page.css").read_text()}</style>
<script>{get_plotlyjs()}</script></head><body><main>
<h1>Collectives compared</h1>
<p class="hint">Time of one call over the size of the buffer, both logarithmic; lower is better. Blocks of
back-to-back calls, the slowest rank counts, libraries take turns, medians. The dashed line is the physical
limit of shared memory: the time in which all ranks at once copy that many bytes, each in its own memory.</p>
{pictures}
<p class="hint">{escape(hardware)}</p>
</main></body></html>
""",
        encoding="utf-8",
    )


def _picture(result: Result, operation: str, ranks: int) -> str:
    rows = [r for r in result.rows if r.operation == operation and r.ranks == ranks]
    figure = go.Figure()
    for i, name in enumerate(dict.fromkeys(label(r) for r in rows)):
        line = sorted((r for r in rows if label(r) == name), key=lambda r: r.num_bytes)
        figure.add_trace(
            go.Scatter(
                x=[r.num_bytes for r in line],
                y=[r.median_s * 1e6 for r in line],
                customdata=[(r.bus_bytes_per_s / 1e9, r.algorithm) for r in line],
                hovertemplate="%{x} B: %{y:.4g} us, %{customdata[0]:.3g} GB/s on the bus, %{customdata[1]}",
                name=name,
                mode="lines+markers",
                line={"color": colour(i), "width": 2},
            )
        )
    limits = sorted((x for x in result.limits if x.ranks == ranks), key=lambda x: x.num_bytes)
    figure.add_trace(
        go.Scatter(
            x=[x.num_bytes for x in limits],
            y=[x.copy_s * 1e6 for x in limits],
            name="physical limit: memory copy",
            mode="lines",
            line={"color": "#888", "dash": "dash"},
        )
    )
    figure.update_layout(template="plotly_white", height=430, margin={"l": 70, "r": 24, "t": 20, "b": 60})
    figure.update_xaxes(type="log", title="bytes in the buffer of a rank")
    figure.update_yaxes(type="log", title="microseconds per call")
    return str(figure.to_html(full_html=False, include_plotlyjs=False))
