"""Where the string of a strategy may be broken: behind `,`, `(` and `+`, so that no name or value is cut."""

from __future__ import annotations

import re
from html import escape

WIDTH = 48
"""Columns of a strategy's string in tables of the terminal and legends of pictures."""


def pieces(strategy: str) -> list[str]:
    """The parts between which a line may end; together they are the string."""
    return re.findall(r"[^,(+]*[,(+]*\s*", strategy)[:-1]


def lines(strategy: str, width: int = WIDTH) -> list[str]:
    """The string in lines of at most `width` columns, unless a name or value is longer by itself."""
    found = [""]
    for piece in pieces(strategy):
        if found[-1] and len(found[-1] + piece.rstrip()) > width:
            found.append("")
        found[-1] += piece
    return [line.rstrip() for line in found]


def html(strategy: str) -> str:
    """The string for HTML, where the browser chooses the breaks."""
    return "<wbr>".join(escape(piece) for piece in pieces(strategy))
