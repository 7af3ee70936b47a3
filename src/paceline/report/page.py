"""A comparison as one self-contained HTML page: nothing is fetched when it is opened."""

from __future__ import annotations

from html import escape
from pathlib import Path

from paceline.bench.rows import Comparison
from paceline.report import charts, ledger, line_breaks, strategy_rows, work
from paceline.report.verdict import (
    SPEED_TIE,
    Criterion,
    amount,
    best_name,
    criteria,
    duration,
    noise,
    notes,
    passes,
    pays,
    percent,
    verdict,
)


def write(comparison: Comparison, path: Path) -> None:
    """Write the page to `path`; folders are made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(comparison), encoding="utf-8")


def render(comparison: Comparison) -> str:
    """The page as text."""
    from plotly.offline import get_plotlyjs

    style = Path(__file__).with_name("page.css").read_text()
    found = criteria(comparison)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Training strategies compared: {escape(comparison.task)}</title>
<style>{style}</style>
<script>{get_plotlyjs()}</script>
</head>
<body>
<main>
{_head(comparison)}
<h2>Who won</h2>
<p class="hint">Four questions, because no strategy is best in every way. What may be chance is a tie:
{100 * noise(comparison):.1f} points of accuracy on {comparison.test_samples:,} test samples, or
{100 * SPEED_TIE:g} % of speed.</p>
<div class="cards">{"".join(_card(c) for c in found)}</div>
<h2>All figures</h2>
<p class="hint">One row per strategy, in the order they ran; the best of each criterion, and those who tie
with it, are green.</p>
{_table(comparison, found)}
{_pictures(comparison)}
{work.section(comparison)}
{ledger.section(comparison)}
{_conditions(comparison)}
</main>
</body>
</html>
"""


def _head(comparison: Comparison) -> str:
    most = max(t.workers for t in comparison.trials)
    return f"""<h1>Training strategies compared: {escape(comparison.task)}</h1>
<p class="lead">The same model was trained {len(comparison.trials)} times from the same initial weights,
each time by a different strategy, on up to {most} workers that share the work and exchange what they
learned. Every dot below is an evaluation on {comparison.test_samples:,} test samples that were never
trained on.</p>
<p class="verdict{" no" if pays(comparison) is False else ""}">{escape(verdict(comparison))}</p>
{"".join(f'<p class="note">{escape(note)}</p>' for note in notes(comparison))}"""


def _card(criterion: Criterion) -> str:
    winners = "<br>".join(f"<code>{line_breaks.html(w)}</code>" for w in criterion.winners)
    return f"""<div class="card"><h3>{escape(criterion.name)}</h3>
<div class="winner">{winners}</div><div class="value">{escape(criterion.value)}</div>
<p>{escape(criterion.question)} {escape(criterion.explanation)}</p></div>"""


def _table(comparison: Comparison, found: list[Criterion]) -> str:
    heads = (
        "strategy",
        "workers",
        "throughput<br>samples/s",
        "time per<br>epoch",
        best_name(comparison).replace(" on ", "<br>on "),
        f"accuracy<br>after {duration(comparison.seconds_budget)}",
        f"accuracy after<br>{passes(comparison.epochs_budget)}",
        "wire bytes<br>per sample",
        "payload<br>per sample",
        "waited for<br>others",
    )
    rows = []
    for i, (trial, row) in enumerate(zip(comparison.trials, comparison.results(), strict=True)):
        speed, best, at_seconds, at_epochs = (
            f'<td class="best">{v}</td>' if trial.strategy in c.winners else f"<td>{v}</td>"
            for c, v in zip(
                found,
                (
                    f"{trial.samples_per_s:,.0f}",
                    percent(trial.best_accuracy),
                    percent(row["accuracy_at_seconds"]),
                    percent(row["accuracy_at_epochs"]),
                ),
                strict=True,
            )
        )
        name = strategy_rows.name(comparison, i)
        rows.append(
            f"<tr><td>{name}</td><td>{trial.workers}</td>{speed}<td>{duration(trial.seconds_per_epoch)}</td>"
            f"{best}{at_seconds}{at_epochs}<td>{amount(trial.bytes_sent_per_sample)}</td>"
            f"<td>{amount(trial.payload_bytes_per_sample)}</td>"
            f"<td>{duration(trial.wait_s)}</td></tr>"
        )
    head = "".join(f"<th>{h}</th>" for h in heads)
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<div class="scroll">{table}</div>'


def _pictures(comparison: Comparison) -> str:
    pictures = [
        (
            "Accuracy over time",
            "The higher a line is at the dashed budget, the better the model you have when you stop there.",
            charts.over_seconds,
        ),
        (
            "Accuracy over epochs",
            "Time aside: a line below the others learns less from each sample, which rare exchange costs.",
            charts.over_epochs,
        ),
        (
            "Accuracy over bytes sent",
            "Each mark to the right is ten times the traffic. On a slow network lines far to the left win.",
            charts.over_bytes,
        ),
    ]
    if any(sum(t.staleness.get("staleness_histogram") or []) for t in comparison.trials):
        pictures.append(
            (
                "Staleness of updates",
                "How many updates by others came between the weights that an update was computed from and "
                "its own turn. The longer the tail, the older the news.",
                charts.staleness,
            )
        )
    return "".join(
        f'<h2>{title}</h2><p class="hint">{hint}</p><div class="chart">{draw(comparison)}</div>'
        for title, hint, draw in pictures
    )


def _conditions(comparison: Comparison) -> str:
    hardware = ", ".join(f"{k} {v}" for k, v in comparison.hardware.items())
    rate = "the task's own" if comparison.learning_rate is None else f"{comparison.learning_rate:g}"
    parameters = comparison.trials[0].model_parameters
    facts = {
        "Training set": f"{comparison.train_samples:,} samples, {comparison.epochs:g} epochs, reshuffled",
        "Global batch": f"{comparison.batch_size} samples per step over all workers, whatever their number",
        "Model": f"{parameters:,} parameters; learning rate: {rate}",
        "Threads": f"{comparison.threads} per worker; as many in all for fewer workers",
        "Seed": f"{comparison.seed}: the same initial weights for every strategy",
        "Fabric": comparison.fabric or "as the workers chose",
        "Clock": "training only; evaluations, and waiting for them, are off the clock, and their traffic is "
        "not counted",
        "Accuracy at a budget": "on the straight line between the evaluations before and after it; the "
        "default time budget is the fastest strategy's training time, so everyone has finished or is cut off "
        "there",
        "Best accuracy": "of the evaluation that was best on "
        + (
            f"{comparison.validation_samples:,} validation samples, which were not trained on"
            if comparison.validation_samples
            else "the test set itself; --validation 0.1 holds out training samples to choose by"
        ),
        "Bytes": "wire bytes are what a worker has to send to others for each sample of its own, by the "
        "schedule of each operation that sends the fewest (2(P−1)/P of an all_reduce's tensor; nothing for "
        "messages to itself); payload is what it hands to its communicator",
        "Machine": hardware or "unknown",
    }
    if comparison.simulated is not None:
        told = {k: v for k, v in comparison.simulated.items() if v and k != "trace"}
        facts["Simulated cluster"] = ", ".join(f"{k}: {v}" for k, v in told.items())
        facts["Clock"] = "virtual seconds of the simulated cluster; " + facts["Clock"]
        facts["Work beside training"] = work.charging(comparison)
    methods = {t.strategy: t.advice for t in comparison.trials if t.advice}
    return (
        "<h2>The strategies</h2>"
        + _definitions(methods)
        + "<h2>Equal conditions</h2>"
        + '<p class="hint">What all strategies had in common. Figures hold for this machine and this '
        "network only.</p>" + _definitions(facts)
    )


def _definitions(facts: dict[str, str]) -> str:
    return (
        "<dl>"
        + "".join(f"<dt>{line_breaks.html(k)}</dt><dd>{escape(v)}</dd>" for k, v in facts.items())
        + "</dl>"
    )
