"""Coordinates, colours and pieces of a space-time picture; `draw` decides what is on it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from paceline.schedule import contract
from paceline.schedule.drawing.holdings import Moment
from paceline.schedule.program import Program
from paceline.schedule.topology import FloatArray

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#aa4499", "#b8860b", "#56b4e9", "#882255", "#44aa99")
INK, _FAINT, _LINE, _DONE = "#1f2933", "#7b8794", "#d5dbe1", "#1b9e5a"
_ROW, _STRIP, _LEFT, _TOP, _BAND_GAP = 40, 56, 92, 92, 52
_WIDTH, _MIN_ARROWS, _MAX_ARROWS = 1180, 92, 190
_DASH = ' stroke-dasharray="5 3"'
_ALONG = np.linspace(0.14, 0.8, 23)
FONT = "system-ui, -apple-system, 'Segoe UI', 'Helvetica Neue', 'DejaVu Sans', Arial, sans-serif"


@dataclass(frozen=True)
class Arrow:
    """What one or more transfers between two ranks carry in one step; `title` lists them."""

    src: int
    dst: int
    is_reduce: bool
    channel: int
    label: str
    title: str


class Page:
    """Coordinates and pieces of the picture."""

    def __init__(
        self,
        program: Program,
        moments: Sequence[Moment],
        arrows: Callable[[Moment], list[Arrow]],
        hosts: Sequence[str] | None,
    ) -> None:
        self.program, self.hosts, self._arrows = program, hosts, arrows
        room = _WIDTH - _LEFT - _STRIP - 12
        fit = room // (_MIN_ARROWS + _STRIP)
        self.bands = max(math.ceil(len(moments) / fit), 1)
        self.per_band = max(math.ceil(len(moments) / self.bands), 1)
        self.column = min(room // self.per_band, _MAX_ARROWS + _STRIP)
        self.band_height = program.num_ranks * _ROW + _BAND_GAP
        self.height = _TOP + self.bands * self.band_height + 84

    def y(self, band: int, rank: int) -> float:
        """Middle of a rank's lane."""
        return _TOP + band * self.band_height + 30 + rank * _ROW + _ROW / 2

    def x(self, column: int) -> float:
        """Left edge of the strip before step `column` of a band."""
        return _LEFT + column * self.column

    def wrap(self, body: str) -> str:
        """The whole SVG text around its pieces."""
        heads = "".join(
            f'<marker id="h{i}" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" '
            f'orient="auto"><path d="M0 0.8 10 5 0 9.2z" fill="{c}"/></marker>'
            for i, c in enumerate(_COLOURS)
        )
        return (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {self.height}" '
            f'width="{_WIDTH}" height="{self.height}" font-family="{FONT}" fill="{INK}">\n'
            f"<title>{escape(str(self.program))}</title><defs>{heads}</defs>\n"
            f'<rect width="100%" height="100%" fill="#fff"/>\n{body}\n</svg>\n'
        )

    def heading(self, caption: str) -> str:
        """Return the title and the caption of the picture."""
        title = f"{self.program.algorithm} · {self.program.operation} · {self.program.num_ranks} ranks"
        return (
            f'<text x="24" y="34" font-size="20" font-weight="700">{escape(title)}</text>\n'
            f'<text x="24" y="60" font-size="15" fill="#3e4c59">{escape(caption)}</text>'
        )

    def band(self, band: int, moments: Sequence[Moment], start: FloatArray) -> str:
        """One line of steps: lanes, arrows and strips."""
        first = band * self.per_band
        mine = moments[first : first + self.per_band]
        parts = [self._lanes(band, len(mine))]
        parts.append(self._strips(band, 0, moments[first - 1].complete if first else start))
        for i, moment in enumerate(mine):
            middle = (self.x(i) + _STRIP + self.x(i + 1)) / 2
            top = self.y(band, 0) - _ROW / 2 - 8
            arrows = self._arrows(moment)
            where = f'<tspan font-weight="400">{self._where(arrows)}</tspan>'
            parts.append(
                f'<text x="{middle:g}" y="{top}" font-size="13" font-weight="600" text-anchor="middle" '
                f'fill="#3e4c59">step {first + i + 1}{where}</text>'
            )
            parts += [self._line(band, i, a) for a in arrows]
            parts += self._labels(band, i, arrows)
            parts.append(self._strips(band, i + 1, moment.complete))
        return "\n".join(parts)

    def _where(self, arrows: Sequence[Arrow]) -> str:
        if self.hosts is None or len(set(self.hosts)) == 1:
            return ""
        kinds = {self.hosts[a.src] == self.hosts[a.dst] for a in arrows}
        return ": both" if len(kinds) > 1 else ": within hosts" if kinds == {True} else ": between hosts"

    def _lanes(self, band: int, steps: int) -> str:
        right = self.x(steps) + _STRIP
        top = self.y(band, 0) - _ROW / 2 - 8
        parts = [
            f'<text x="{_LEFT - 10}" y="{top}" font-size="12" fill="{_FAINT}" text-anchor="end">time →</text>'
        ]
        if self.hosts is not None:
            parts += self._host_bands(band, right)
        for r in range(self.program.num_ranks):
            y = self.y(band, r)
            parts.append(
                f'<line x1="{_LEFT}" y1="{y}" x2="{right}" y2="{y}" stroke="{_LINE}"/>'
                f'<text x="{_LEFT - 10}" y="{y + 4.5}" font-size="13" text-anchor="end">rank {r}</text>'
            )
        return "\n".join(parts)

    def _host_bands(self, band: int, right: float) -> list[str]:
        assert self.hosts is not None
        shades, words, order = [], [], list(dict.fromkeys(self.hosts))
        for r, host in enumerate(self.hosts):
            top = self.y(band, r) - _ROW / 2
            fill = ("#eef3f9", "#fdf4e7")[order.index(host) % 2]
            shades.append(f'<rect x="8" y="{top}" width="{right - 2}" height="{_ROW}" fill="{fill}"/>')
            if r and self.hosts[r - 1] == host:
                continue
            last = next((i for i in range(r, len(self.hosts)) if self.hosts[i] != host), len(self.hosts)) - 1
            middle = (self.y(band, r) + self.y(band, last)) / 2
            words.append(
                f'<text transform="translate(26 {middle}) rotate(-90)" font-size="12.5" fill="#52606d" '
                f'text-anchor="middle">{escape(host)}</text>'
            )
        return shades + words

    def _strips(self, band: int, column: int, complete: FloatArray) -> str:
        cells = complete.shape[1]
        left, width = self.x(column) + 4, _STRIP - 8
        size = width / max(cells, 1)
        boxes: dict[str, list[str]] = {}
        for r in range(self.program.num_ranks):
            top = self.y(band, r) - 8
            boxes.setdefault("#fff", []).append(f"M{left:g} {top:g}h{width}v16h-{width}z")
            for c in range(cells):
                if complete[r, c] > 0:
                    box = f"M{round(left + c * size, 2):g} {top:g}h{size:.4g}v16h-{size:.4g}z"
                    boxes.setdefault(_shade(float(complete[r, c])), []).append(box)
        paths = "".join(f'<path fill="{fill}" d="{"".join(d)}"/>' for fill, d in boxes.items())
        return f'<g stroke="#9aa5b1" stroke-width="0.5">{paths}</g>'

    def _way(self, band: int, column: int, arrow: Arrow) -> tuple[float, float, float, float]:
        x1, x2 = self.x(column) + _STRIP + 2, self.x(column + 1) - 2
        return x1, self.y(band, arrow.src), x2, self.y(band, arrow.dst)

    def _line(self, band: int, column: int, arrow: Arrow) -> str:
        x1, y1, x2, y2 = self._way(band, column, arrow)
        head, dash = arrow.channel % len(_COLOURS), "" if arrow.is_reduce else _DASH
        return (
            f'<g class="arrow"><title>{escape(arrow.title)}</title>'
            f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke-width="1.7" '
            f'stroke="{_COLOURS[head]}"{dash} marker-end="url(#h{head})"/></g>'
        )

    def _labels(self, band: int, column: int, arrows: Sequence[Arrow]) -> list[str]:
        """Place one label per arrow, where it is farthest from the other arrows and labels.

        Three or more arrows that carry the same to or from one rank share a label beside that rank.
        """
        ways = np.array([self._way(band, column, a) for a in arrows])
        start, move = ways[:, :2], ways[:, 2:] - ways[:, :2]
        placed: list[tuple[float, float, float]] = []
        parts: list[str] = []

        def put(x: float, y: float, arrow: Arrow) -> None:
            words = ("+" if arrow.is_reduce else "") + arrow.label
            placed.append((x, y, 3.9 * len(words)))
            parts.append(
                f'<text x="{x:.1f}" y="{y + 4:.1f}" fill="{_colour(arrow.channel)}">{escape(words)}</text>'
            )

        alone = []
        for i, end in _shared(arrows):
            if end:
                side, row = (1, arrows[i].dst) if end == "dst" else (-1, arrows[i].src)
                put(float(ways[i, 2 if side > 0 else 0]) - side * 30, self.y(band, row), arrows[i])
            else:
                alone.append(i)
        for i in alone:
            arrow = arrows[i]
            if not arrow.label:
                continue
            spots = start[i] + _ALONG[:, None] * move[i]
            room = np.full(len(_ALONG), np.inf)
            others = np.arange(len(arrows)) != i
            if others.any():
                room = _distance(spots, start[others], move[others]).min(axis=1)
            half = 3.9 * (len(arrow.label) + arrow.is_reduce)
            for x, y, width in placed:
                apart = np.maximum(abs(spots[:, 0] - x) / (half + width + 3), abs(spots[:, 1] - y) / 15)
                room = np.minimum(room, 13 * apart)
            best = spots[int(np.argmax(np.minimum(room, 13.0) - np.abs(_ALONG - 0.34)))]
            put(float(best[0]), float(best[1]), arrow)
        style = 'font-size="12.5" font-weight="600" text-anchor="middle" pointer-events="none"'
        halo = 'stroke="#fff" stroke-width="4" stroke-linejoin="round" paint-order="stroke"'
        return [f"<g {style} {halo}>", *parts, "</g>"]

    def legend(self) -> str:
        """Two lines: what arrows mean, what strips mean."""
        arrows = _Line(24, self.height - 58)
        if self._reduces:
            arrows.arrow("", "+3").words("chunk 3 is sent and added to what the receiver has")
        label, words = self._copied
        arrows.arrow(_DASH, label).words(words)
        if self.program.num_channels > 1:
            for channel in range(min(self.program.num_channels, 4)):
                arrows.box(_COLOURS[channel]).words(f"channel {channel}")
        strips = _Line(24, self.height - 28)
        cell = "chunk, chunk 0" if self._copied[0] != "2→5" else "block, that from rank 0"
        strips.words(f"Strip: what the rank holds, one cell per {cell} on the left:")
        p = self.program.num_ranks
        if self._reduces:
            strips.box(_shade(1 / p)).words("one rank's part")
            strips.box(_shade(0.75)).words("a partial sum (darker: more ranks in it)")
            strips.box(_DONE).words(f"the sum of all {p} ranks")
        else:
            strips.box("#fff").words("not yet").box(_DONE).words("there")
        return "\n".join((*arrows.parts, *strips.parts))

    @property
    def _reduces(self) -> bool:
        return contract.base_operation(self.program.operation) in contract.REDUCING

    @property
    def _copied(self) -> tuple[str, str]:
        operation = contract.base_operation(self.program.operation)
        if operation == "all_to_all":
            return "2→5", "the block from rank 2 for rank 5 is copied"
        return ("3", "chunk 3 is copied to the receiver") if operation != "barrier" else ("", "a signal")


class _Line:
    """One line of the legend, filled from the left."""

    def __init__(self, x: float, y: float) -> None:
        self.parts: list[str] = []
        self._x, self._y = x, y

    def words(self, text: str) -> _Line:
        self.parts.append(f'<text x="{self._x}" y="{self._y + 4.5}" font-size="13">{escape(text)}</text>')
        self._x += 6.9 * len(text) + 16
        return self

    def arrow(self, dash: str, label: str) -> _Line:
        x, y, colour = self._x, self._y, _COLOURS[0]
        self.parts.append(
            f'<line x1="{x}" y1="{y}" x2="{x + 56}" y2="{y}" stroke-width="1.7" stroke="{colour}"{dash} '
            f'marker-end="url(#h0)"/><text x="{x + 24}" y="{y + 4}" font-size="12.5" font-weight="600" '
            f'text-anchor="middle" fill="{colour}" stroke="#fff" stroke-width="4" paint-order="stroke">'
            f"{label}</text>"
        )
        self._x += 64
        return self

    def box(self, colour: str) -> _Line:
        self.parts.append(
            f'<rect x="{self._x}" y="{self._y - 8}" width="14" height="16" fill="{colour}" stroke="#9aa5b1"/>'
        )
        self._x += 21
        return self


def _shared(arrows: Sequence[Arrow]) -> list[tuple[int, str]]:
    """Arrows that need a label: (index, "dst" or "src" if the label is shared at that end, else "")."""
    groups: dict[tuple[object, ...], list[int]] = {}
    for i, a in enumerate(arrows):
        for end, rank in (("dst", a.dst), ("src", a.src)):
            groups.setdefault((end, rank, a.is_reduce, a.channel, a.label), []).append(i)
    chosen: list[tuple[int, str]] = []
    done: set[int] = set()
    for key, members in groups.items():
        if len(members) >= 3 and not done & set(members):
            chosen.append((members[0], str(key[0])))
            done.update(members)
    return chosen + [(i, "") for i in range(len(arrows)) if i not in done]


def _colour(channel: int) -> str:
    return _COLOURS[channel % len(_COLOURS)]


def _distance(points: FloatArray, start: FloatArray, move: FloatArray) -> FloatArray:
    """Distances (px) of points (k, 2) to line segments (n, 2), shape (k, n)."""
    away = points[:, None] - start
    along = np.clip((away * move).sum(axis=2) / (move * move).sum(axis=1), 0, 1)
    return np.asarray(np.hypot(*np.moveaxis(away - along[..., None] * move, 2, 0)))


def _shade(share: float) -> str:
    """White-blue to grey-blue for a part of the sum, green for the whole."""
    if share >= 1:
        return _DONE
    low, high = (232, 238, 245), (84, 104, 130)
    r, g, b = (round(a + (z - a) * share) for a, z in zip(low, high, strict=True))
    return f"#{r:02x}{g:02x}{b:02x}"
