"""`paceline schedule verify`: prove shipped programs in all their lowered forms."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import typer

from paceline.cli.arguments import schedule as arguments
from paceline.errors import ConfigError

if TYPE_CHECKING:
    from paceline.collectives.verification.sweep import Case, Summary


def run(name: str | None, *, every: bool, operation: str | None, ranks: Sequence[int], as_json: bool) -> None:
    """Verify, print, and exit with 1 if a program is not correct."""
    from paceline.collectives.verification import sweep

    cases = _cases(name, every=every, operation=operation, ranks=ranks)
    summary, started = sweep.Summary(), time.perf_counter()
    for case in _with_progress(cases, shown=not as_json and sys.stderr.isatty()):
        sweep.verify_case(case, summary, twins=operation is None)
    report = _report(cases, summary, ranks, time.perf_counter() - started)
    if as_json:
        typer.echo(json.dumps(report))
    else:
        for failure in report["failures"]:
            typer.secho(f"not correct: {failure['program']}: {failure['reason']}", fg=typer.colors.RED)
        word = "all correct" if report["ok"] else f"{len(report['failures'])} NOT CORRECT"
        typer.echo(
            f"{report['programs']} programs of {len(report['algorithms'])} algorithms, "
            f"{report['lowered']} lowered forms ({report['executable']} executable, others modelled only), "
            f"{report['instructions']} instructions: {word} "
            f"({report['seconds']:.1f} s)"
        )
    if summary.failures:
        raise typer.Exit(1)


def _cases(name: str | None, *, every: bool, operation: str | None, ranks: Sequence[int]) -> list[Case]:
    from paceline import collectives
    from paceline.collectives.verification import sweep
    from paceline.schedule import contract

    if (name is None) != every:
        raise ConfigError("give the name of one algorithm or --all; `paceline schedule list` lists them")
    operations = None
    if operation is not None:
        contract.base_operation(operation)
        operations = [operation]
    if name is None:
        found = list(sweep.cases(ranks, operations=operations))
    else:
        algorithm, options = arguments.algorithm(name)
        answers = [
            (p, o, collectives.supports(algorithm, o, p, **options))
            for p in ranks
            for o in operations or collectives.find(algorithm).OPERATIONS
        ]
        found = list(sweep.cases(ranks, algorithms=[algorithm], operations=operations))
        if options:  # these instead of the algorithm's VARIANTS
            found = [
                sweep.Case(algorithm, o, p, root, options)
                for p, o, answer in answers
                if answer
                for root in (range(p) if o in contract.ROOTED else (0,))
            ]
        if not found:
            raise ConfigError(f"{name} on {answers[0][0]} ranks: {answers[0][2]}")
    if not found:
        raise ConfigError(f"no algorithm supports {operation} on these numbers of ranks")
    return found


def _with_progress(cases: Sequence[Case], *, shown: bool) -> Iterable[Case]:
    if not shown:
        yield from cases
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    with Progress(
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
        console=Console(stderr=True),
        transient=True,
    ) as progress:
        task = progress.add_task("", total=len(cases))
        for case in cases:
            progress.update(task, description=str(case))
            yield case
            progress.advance(task)


def _report(cases: Sequence[Case], summary: Summary, ranks: Sequence[int], seconds: float) -> dict[str, Any]:
    return {
        "ok": not summary.failures,
        "algorithms": sorted({c.algorithm for c in cases}),
        "operations": sorted({c.operation for c in cases}),
        "ranks": list(ranks),
        "programs": summary.programs,
        "lowered": summary.lowered,
        "executable": summary.executable,
        "instructions": summary.instructions,
        "messages": summary.messages,
        "dependencies": summary.dependencies,
        "failures": [{"program": case, "reason": reason} for case, reason in summary.failures],
        "seconds": seconds,
    }
