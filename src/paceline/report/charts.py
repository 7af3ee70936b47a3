"""The pictures of a comparison: accuracy over time, data and network; staleness if there is any."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import plotly.graph_objects as go

from paceline.bench.rows import Comparison, Point, Trial
from paceline.report import line_breaks

# Okabe & Ito's colours: told apart by everyone.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A5195", "#4D4D4D")
_SYMBOLS = ("circle", "square", "diamond", "triangle-up", "cross", "star", "hexagon", "triangle-down")
_HEIGHT = 430


def colour(index: int) -> str:
    """The colour of the strategy at `index`, the same in every picture and in the table."""
    return _COLOURS[index % len(_COLOURS)]


def over_seconds(comparison: Comparison) -> str:
    """Accuracy over training time, with the wall-clock budget."""
    figure = _lines(comparison, lambda p: p.seconds, "training time in seconds (evaluation does not count)")
    _mark(figure, comparison.seconds_budget, f"budget: {comparison.seconds_budget:.3g} s")
    return _html(figure)


def over_epochs(comparison: Comparison) -> str:
    """Accuracy over passes through the training set, with the epoch budget."""
    figure = _lines(comparison, lambda p: p.epoch, "epochs (passes over the training set)")
    _mark(figure, comparison.epochs_budget, f"budget: {comparison.epochs_budget:g}")
    return _html(figure)


def over_bytes(comparison: Comparison) -> str:
    """Accuracy over bytes sent, logarithmic; those who send nothing are horizontal lines."""
    figure = _lines(
        comparison,
        lambda p: p.bytes_sent / 1e6,
        "megabytes sent by all workers together (logarithmic)",
        keep=lambda p: p.bytes_sent > 0,
    )
    figure.update_xaxes(type="log", dtick=1)
    for i, trial in enumerate(comparison.trials):
        if trial.curve[-1].bytes_sent == 0:
            figure.add_hline(
                y=100 * trial.best_accuracy,
                line={"color": colour(i), "dash": "dot", "width": 2},
                annotation={
                    "text": _wrapped(f"{trial.strategy}: best, sends nothing"),
                    "font": {"color": colour(i), "size": 13},
                },
                annotation_position="bottom left",
            )
    return _html(figure)


def staleness(comparison: Comparison) -> str:
    """Share of applied updates by staleness, for the strategies that count it, with the means."""
    figure = go.Figure()
    for i, trial in enumerate(comparison.trials):
        counts = trial.staleness.get("staleness_histogram") or []
        if sum(counts):
            figure.add_trace(
                go.Scatter(
                    x=list(range(len(counts))),
                    y=[100 * c / sum(counts) for c in counts],
                    name=_wrapped(f"{trial.strategy}: mean {trial.staleness['staleness_mean']:.3g}"),
                    mode="lines",
                    line={"color": colour(i), "width": 2, "shape": "hvh"},
                    fill="tozeroy",
                    hovertemplate="<b>%{y:.2f} %</b> of updates at staleness %{x}<extra></extra>",
                )
            )
    _dress(figure)
    figure.update_layout(showlegend=True)
    figure.update_xaxes(title="staleness: updates by others between an update's pull and its application")
    figure.update_yaxes(title="share of updates in %")
    return _html(figure)


def _lines(
    comparison: Comparison,
    x: Callable[[Point], float],
    label: str,
    keep: Callable[[Point], bool] = lambda p: True,
) -> go.Figure:
    figure = go.Figure()
    for i, trial in enumerate(comparison.trials):
        points = [p for p in trial.curve if keep(p)]
        if points:
            figure.add_trace(_line(i, trial, points, x))
    _dress(figure)
    figure.update_xaxes(title=label)
    figure.update_yaxes(title="test accuracy in %", range=_range(comparison.trials))
    return figure


def _wrapped(strategy: str) -> str:
    """As many lines as a long string needs: legends do not break lines themselves."""
    return "<br>".join(line_breaks.lines(strategy))


def _dress(figure: go.Figure) -> None:
    """Size, fonts and legend, the same for all pictures."""
    figure.update_layout(
        template="plotly_white",
        height=_HEIGHT,
        margin={"l": 70, "r": 24, "t": 30, "b": 60},
        legend={"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0},
        font={"size": 14, "color": "#1c2733"},
        hovermode="closest",
    )


def _line(index: int, trial: Trial, points: Sequence[Point], x: Callable[[Point], float]) -> go.Scatter:
    return go.Scatter(
        x=[x(p) for p in points],
        y=[100 * p.accuracy for p in points],
        name=_wrapped(trial.strategy),
        mode="lines+markers",
        line={"color": colour(index), "width": 2.5},
        marker={"symbol": _SYMBOLS[index % len(_SYMBOLS)], "size": 8},
        customdata=[[p.epoch, p.seconds, p.bytes_sent / 1e6] for p in points],
        hovertemplate="<b>%{y:.2f} %</b> after %{customdata[0]:.2f} epochs, %{customdata[1]:.2f} s, "
        "%{customdata[2]:.3g} MB<extra>" + _wrapped(trial.strategy) + "</extra>",
    )


def _range(trials: Sequence[Trial]) -> list[float]:
    """Without the worst eighth of the evaluations, so that the differences at the end can be seen."""
    trained = sorted(100 * p.accuracy for t in trials for p in t.curve if p.samples)
    low, high = trained[len(trained) // 8], trained[-1]
    room = max(0.06 * (high - low), 0.2)
    return [max(0.0, low - room), min(100.5, high + room)]


def _mark(figure: go.Figure, x: float, text: str) -> None:
    figure.add_vline(
        x=x,
        line={"color": "#5b6b7b", "dash": "dash", "width": 1.5},
        annotation={"text": text, "font": {"color": "#5b6b7b", "size": 13}},
        annotation_position="bottom left",
    )


def _html(figure: go.Figure) -> str:
    """The figure alone; the page carries the library once."""
    text: str = figure.to_html(
        full_html=False,
        include_plotlyjs=False,
        config={"displayModeBar": False, "responsive": True},
    )
    return text
