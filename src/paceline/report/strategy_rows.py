"""What a comparison tells of some of its strategies, a row each, as a part of the page and as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich import box
from rich.table import Table

from paceline.bench.rows import Comparison
from paceline.report import charts, line_breaks


def name(comparison: Comparison, i: int) -> str:
    """Strategy number `i` in HTML, with the colour that it has in all pictures."""
    strategy = line_breaks.html(comparison.trials[i].strategy)
    return f'<span class="dot" style="background:{charts.colour(i)}"></span>{strategy}'


def in_lines(strategy: str) -> str:
    """The string of a strategy for a cell of a table of the terminal."""
    return "\n".join(line_breaks.lines(strategy))


def section(
    comparison: Comparison, cells: Mapping[int, Sequence[str]], *, title: str, hint: str, heads: Sequence[str]
) -> str:
    """A heading and a table in HTML; nothing without rows.

    Args:
        comparison: Whose strategies the rows are about.
        cells: Number of the strategy → what its row says under `heads`.
        title: The heading.
        hint: What the figures mean.
        heads: Heads of the columns after that of the strategy.
    """
    if not cells:
        return ""
    rows = [
        f"<tr><td>{name(comparison, i)}</td>{''.join(f'<td>{c}</td>' for c in row)}</tr>"
        for i, row in cells.items()
    ]
    head = "".join(f"<th>{h}</th>".replace("\n", "<br>") for h in ("strategy", *heads))
    return (
        f'<h2>{title}</h2><p class="hint">{hint}</p><div class="scroll"><table><thead><tr>{head}</tr>'
        f"</thead><tbody>{''.join(rows)}</tbody></table></div>"
    )


def table(
    comparison: Comparison, cells: Mapping[int, Sequence[str]], *, title: str, heads: Sequence[str]
) -> Table | None:
    """The same for the terminal; None without rows."""
    if not cells:
        return None
    made = Table(box=box.SIMPLE_HEAD, padding=(0, 1), title=title)
    made.add_column("strategy", min_width=16, no_wrap=True)
    for head in heads:
        made.add_column(head, justify="right", no_wrap=True)
    for i, row in cells.items():
        made.add_row(in_lines(comparison.trials[i].strategy), *row)
    return made
