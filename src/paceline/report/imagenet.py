"""The ways of ImageNet training as one self-contained page: speed, and the figures behind it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from paceline.report import line_breaks

_STYLE = """body{font:16px/1.5 system-ui,sans-serif;max-width:1060px;margin:2em auto;padding:0
1em;color:#1c2733}
table{border-collapse:collapse;width:100%;font-size:14px}th,td{padding:.4em .6em;text-align:right}
th:first-child,td:first-child{text-align:left}tr:nth-child(even){background:#f3f6f9}p{max-width:46em}"""
_COLUMNS = (
    ("workers", "workers", "{:d}"),
    ("seconds per epoch", "seconds_per_epoch", "{:.2f}"),
    ("pictures per second", "samples_per_s", "{:.0f}"),
    ("of one process", "efficiency", "{:.0%}"),
    ("times DDP", "speed_over_ddp", "{:.2f}"),
    ("evaluation, s", "evaluation_s", "{:.2f}"),
    ("peak memory per worker, MB", "peak_memory_bytes", "{:.0f}"),
    ("sent per worker, MB", "bytes_sent_per_worker", "{:.1f}"),
    ("top-1", "top1", "{:.3f}"),
)


def page(document: Mapping[str, Any]) -> str:
    """Return the page for what `paceline bench imagenet --json` writes."""
    from plotly.offline import get_plotlyjs

    rows = document["results"]
    notes = "".join(f"<p>* {escape(r['way'])}: {escape(r['note'])}.</p>" for r in rows if r["note"])
    return f"""<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Ways of training</title>
<style>{_STYLE}</style><script>{get_plotlyjs()}</script></head><body>
<h1>Ways of training on the same pictures</h1>
<p>The same model and the same pictures, {document["workers"]} workers with {document["threads_per_worker"]}
thread(s) each, a global batch of {document["batch_size"]}. The runs took turns; every figure is the median of
{rows[0]["runs"]} run(s). "Of one process" compares with a single process that uses all these threads;
"times DDP" with DistributedDataParallel under a launcher, run by run.</p>
{_chart(rows)}{_table(rows)}{notes}
<p>Bytes sent are what a worker hands to its collectives; 0.0 where a way cannot tell.</p></body></html>"""


def _chart(rows: Sequence[Mapping[str, Any]]) -> str:
    import plotly.graph_objects as go

    bars = go.Bar(
        x=[r["samples_per_s"] for r in rows],
        y=["<br>".join(line_breaks.lines(r["way"])) for r in rows],
        orientation="h",
        text=[f"{r['samples_per_s']:.0f}" for r in rows],
        marker={"color": ["#0072B2" if r["way"].startswith("Paceline") else "#9aa7b4" for r in rows]},
    )
    figure = go.Figure(bars)
    figure.update_layout(
        template="plotly_white", height=60 + 42 * len(rows), margin={"l": 10, "r": 10, "t": 10}
    )
    figure.update_yaxes(autorange="reversed", automargin=True)
    figure.update_xaxes(title="pictures per second, higher is better")
    return str(figure.to_html(full_html=False, include_plotlyjs=False))


def _table(rows: Sequence[Mapping[str, Any]]) -> str:
    head = "".join(f"<th>{title}</th>" for title, _, _ in _COLUMNS)
    body = ""
    for r in rows:
        scaled = {
            k: v / 1e6 if k.endswith(("_bytes", "_per_worker")) else v
            for k, v in r.items()
            if v.__class__ in (int, float)
        }
        cells = "".join(f"<td>{form.format(scaled[key])}</td>" for _, key, form in _COLUMNS)
        body += f"<tr><td>{line_breaks.html(r['way'])}{' *' if r['note'] else ''}</td>{cells}</tr>"
    return f"<table><thead><tr><th>way</th>{head}</tr></thead><tbody>{body}</tbody></table>"
