"""A program as a picture: ranks down, steps across, one arrow per message, coloured by channel.

Between the steps a strip shows for each rank how much of the result it holds, one cell per chunk. Long
programs continue on the next line. The SVG needs no scripts and no external fonts.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from paceline.errors import ConfigError
from paceline.schedule import contract
from paceline.schedule.drawing.holdings import Holdings, Moment
from paceline.schedule.drawing.spacetime import FONT, INK, Arrow, Page
from paceline.schedule.program import REDUCE, Op, Program
from paceline.schedule.topology import FloatArray

MAX_RANKS = 64
MAX_STEPS = 128


def svg(program: Program, *, caption: str = "", hosts: Sequence[str] | None = None) -> str:
    """Draw `program` as SVG text.

    `caption`: one sentence under the title. `hosts`: the host of every rank, drawn as shaded bands.
    Raises ConfigError for more than MAX_RANKS ranks or MAX_STEPS steps.
    """
    moments, start = _message_steps(program)
    page = Page(program, moments, lambda moment: _arrows(moment, program), hosts)
    parts = [page.heading(caption)]
    for band in range(page.bands):
        parts.append(page.band(band, moments, start))
    parts.append(page.legend())
    return page.wrap("\n".join(parts))


def html(program: Program, *, caption: str = "", hosts: Sequence[str] | None = None) -> str:
    """Return a self-contained page: the picture, larger arrows on hover, and the steps as text."""
    title = escape(str(program))
    listing = escape("\n".join(text(program)))
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title>
<style>
body {{ font-family: {FONT}; margin: 24px; color: {INK}; background: #fff; }}
svg {{ max-width: 100%; height: auto; }}
svg .arrow:hover line {{ stroke-width: 4; }} svg .arrow line {{ pointer-events: stroke; }}
pre {{ background: #f5f7fa; padding: 12px; overflow: auto; font-size: 13px; }}
</style></head><body>
{svg(program, caption=caption, hosts=hosts)}
<details><summary>Every step as text</summary><pre>{listing}</pre></details>
</body></html>
"""


def text(program: Program) -> list[str]:
    """Every step as lines of text; a step without messages is headed "within ranks"."""
    _check_size(program)
    lines, number = [], 0
    for step in program.steps():
        if step.is_local:
            lines.append("within ranks")
        else:
            number += 1
            lines.append(f"step {number}")
        many = program.num_channels > 1
        lines += [f"  {op}{f'  (channel {op.channel})' if many else ''}" for op in step.ops()]
    return lines


def _check_size(program: Program) -> None:
    if program.num_ranks > MAX_RANKS:
        raise ConfigError(
            f"{program}: at most {MAX_RANKS} ranks can be shown; give fewer with --ranks, "
            "or use `paceline schedule simulate`"
        )


def _message_steps(program: Program) -> tuple[list[Moment], FloatArray]:
    """Return the steps with messages, and what the ranks hold before the first.

    A local step is joined to the step before it.
    """
    _check_size(program)
    holdings = Holdings(program)
    start, kept = holdings.complete(), []
    for moment in holdings.walk():
        if not moment.step.is_local:
            kept.append(moment)
        elif kept:
            kept[-1] = Moment(kept[-1].step, kept[-1].logical, moment.complete)
        else:
            start = moment.complete
        if len(kept) > MAX_STEPS:
            raise ConfigError(
                f"{program}: more than {MAX_STEPS} steps do not fit a picture; give fewer ranks"
            )
    return kept, start


def _arrows(moment: Moment, program: Program) -> list[Arrow]:
    """One arrow per (src, dst, kind, channel), labelled with all chunks it carries."""
    carried: dict[tuple[int, int, bool, int], list[int]] = {}
    titles: dict[tuple[int, int, bool, int], list[Op]] = {}
    for op, logical in zip(moment.step.ops(), moment.logical, strict=True):
        if op.src_rank == op.dst_rank:
            continue
        key = (op.src_rank, op.dst_rank, op.kind == REDUCE, op.channel)
        carried.setdefault(key, []).extend(logical)
        titles.setdefault(key, []).append(op)
    arrows = []
    for key, chunks in carried.items():
        src, dst, is_reduce, channel = key
        title = "\n".join(str(op) for op in titles[key])
        arrows.append(Arrow(src, dst, is_reduce, channel, _chunks(chunks, program), title))
    return arrows


def _chunks(numbers: Sequence[int], program: Program) -> str:
    """`3`, `0–3`, `0 2 4`; for all_to_all source→destination of each block; empty for a barrier."""
    operation = contract.base_operation(program.operation)
    if operation == "barrier":
        return ""
    if operation == "all_to_all":
        block = program.num_chunks // program.num_ranks
        pairs = sorted({divmod(n // block, program.num_ranks) for n in numbers})
        names = [f"{a}→{b}" for a, b in pairs]
        return " ".join(names) if len(names) <= 2 else f"{len(names)} blocks"
    runs: list[list[int]] = []
    for n in sorted(set(numbers)):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    shown = [f"{a}" if a == b else f"{a}–{b}" for a, b in runs]
    return " ".join(shown) if len(shown) <= 3 else f"{len(set(numbers))} chunks"
