"""A line chart as SVG, for the pictures of the documentation."""

from __future__ import annotations

from pathlib import Path

PICTURES = Path(__file__).resolve().parents[1] / "docs" / "pictures"
COLOURS = ["#2563eb", "#dc2626", "#059669", "#d97706", "#7c3aed", "#0891b2", "#be185d", "#4b5563"]
Series = dict[str, list[tuple[float, float]]]


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
    """Write docs/pictures/<name>.svg. `ticks`: x positions and their labels (default: all points)."""
    xs = [p[0] for s in series.values() for p in s]
    top = max(p[1] for s in series.values() for p in s)
    top += 0.08 * (top - bottom)
    width, height, left, base = 720, 400, 70, 340
    low, span = min(xs), (max(xs) - min(xs)) or 1.0

    def at(px: float, py: float) -> tuple[float, float]:
        height_share = max(0.0, py - bottom) / (top - bottom)
        return left + (px - low) / span * (width - left - 30), base - height_share * (base - 50)

    middle = base / 2 + 25
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        f'<text x="{left}" y="26" font-size="16">{title}</text>',
        f'<text x="{width / 2}" y="{height - 12}" text-anchor="middle" font-size="13">{x}</text>',
        f'<text x="16" y="{middle}" font-size="13" transform="rotate(-90 16 {middle})" '
        f'text-anchor="middle">{y}</text>',
    ]
    for i in range(5):
        value = bottom + (top - bottom) * i / 4
        _, gy = at(low, value)
        out.append(f'<line x1="{left}" x2="{width - 30}" y1="{gy:.1f}" y2="{gy:.1f}" stroke="#e5e7eb"/>')
        label = f'<text x="{left - 8}" y="{gy + 4:.1f}" text-anchor="end" font-size="11">'
        out.append(f"{label}{value:.3g}</text>")
    for tick, text in (ticks or {tick: f"{tick:g}" for tick in sorted(set(xs))}).items():
        if low <= tick <= low + span:
            head = f'<text x="{at(tick, 0)[0]:.1f}" y="{base + 18}" text-anchor="middle" font-size="11">'
            out.append(f"{head}{text}</text>")
    for i, (label, points) in enumerate(series.items()):
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b in (at(*p) for p in points))
        dash = ' stroke-dasharray="5 4"' if "formula" in label or "queue" in label else ""
        colour = COLOURS[i % len(COLOURS)]
        out.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"{dash}/>')
        a, b = at(*points[-1])
        legend = f'<text x="{left + 10}" y="{56 + 17 * i}" font-size="12" fill="{colour}">'
        out.append(f"{legend}{label}</text>")
        out.append(f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{colour}"/>')
    PICTURES.mkdir(parents=True, exist_ok=True)
    (PICTURES / f"{name}.svg").write_text("\n".join([*out, "</svg>"]) + "\n")
