"""A line chart as SVG, for the pictures of the documentation."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil, floor, log10
from pathlib import Path

PICTURES = Path(__file__).resolve().parents[1] / "docs" / "pictures"
COLOURS = ["#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2", "#be185d", "#4b5563"]
Series = dict[str, list[tuple[float, float]]]
WIDTH, LEFT, RIGHT, PLOT_HEIGHT = 720, 70, 690, 290


def draw(
    name: str,
    title: str,
    x: str,
    y: str,
    series: Series,
    *,
    ticks: dict[float, str] | None = None,
    bottom: float = 0.0,
) -> None:
    """Write docs/pictures/<name>.svg. `ticks`: x positions and their labels (default: all points).

    The y axis starts at `bottom`, lower points are drawn there; the legend stands above the plot.
    """
    xs = [p[0] for s in series.values() for p in s]
    ys = [p[1] for s in series.values() for p in s]
    levels = round_levels(bottom, max(ys))
    low, span = min(xs), (max(xs) - min(xs)) or 1.0
    top = 36 + 17 * ceil(len(series) / 2) + 12
    base = top + PLOT_HEIGHT

    def at(px: float, py: float) -> tuple[float, float]:
        share = max(0.0, py - levels[0]) / (levels[-1] - levels[0])
        return LEFT + (px - low) / span * (RIGHT - LEFT), base - share * PLOT_HEIGHT

    out = _frame(title, x, y, top, base)
    for value in levels:
        gy = at(low, value)[1]
        out.append(f'<line x1="{LEFT}" x2="{RIGHT}" y1="{gy:.1f}" y2="{gy:.1f}" stroke="#e5e7eb"/>')
        label = f'<text x="{LEFT - 8}" y="{gy + 4:.1f}" text-anchor="end" font-size="11">'
        out.append(f"{label}{value:,g}</text>")
    for tick, text in (ticks or {tick: f"{tick:g}" for tick in sorted(set(xs))}).items():
        if low <= tick <= low + span:
            head = f'<text x="{at(tick, 0)[0]:.1f}" y="{base + 18}" text-anchor="middle" font-size="11">'
            out.append(f"{head}{text}</text>")
    for i, (label, points) in enumerate(series.items()):
        out += _line(i, label, points, at)
    PICTURES.mkdir(parents=True, exist_ok=True)
    (PICTURES / f"{name}.svg").write_text("\n".join([*out, "</svg>"]) + "\n")


def round_levels(low: float, high: float) -> list[float]:
    """Four to nine round numbers, evenly spaced, that enclose both."""
    raw = (high - low) / 5 or 1.0
    power = 10.0 ** floor(log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw)
    first, last = floor(low / step + 1e-9), ceil(high / step - 1e-9)
    return [round(i * step, 9) for i in range(first, last + 1)]


def _frame(title: str, x: str, y: str, top: int, base: int) -> list[str]:
    height, middle = base + 60, (top + base) / 2
    return [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif">',
        f'<rect width="{WIDTH}" height="{height}" fill="white"/>',
        f'<text x="{LEFT}" y="26" font-size="16">{title}</text>',
        f'<text x="{(LEFT + RIGHT) / 2}" y="{height - 16}" text-anchor="middle" font-size="13">{x}</text>',
        f'<text x="16" y="{middle}" font-size="13" transform="rotate(-90 16 {middle})" '
        f'text-anchor="middle">{y}</text>',
    ]


def _line(
    index: int,
    label: str,
    points: list[tuple[float, float]],
    at: Callable[[float, float], tuple[float, float]],
) -> list[str]:
    """The legend's entry (two columns), the line, and a dot at each point."""
    colour = COLOURS[index % len(COLOURS)]
    dash = ' stroke-dasharray="5 4"' if "formula" in label or "queue" in label else ""
    stroke = f'stroke="{colour}" stroke-width="2"{dash}'
    x, y = LEFT + (RIGHT - LEFT) / 2 * (index % 2), 46 + 17 * (index // 2)
    places = [at(*p) for p in points]
    path = " ".join(f"{a:.1f},{b:.1f}" for a, b in places)
    dots = [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="2.5" fill="{colour}"/>' for a, b in places]
    return [
        f'<line x1="{x}" x2="{x + 22}" y1="{y - 4}" y2="{y - 4}" {stroke}/>',
        f'<text x="{x + 28}" y="{y}" font-size="12" fill="{colour}">{label}</text>',
        f'<polyline points="{path}" fill="none" {stroke}/>',
        *dots,
    ]
