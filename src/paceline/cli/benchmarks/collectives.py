"""`paceline bench collectives`: latency and bandwidth of collectives, compared with Gloo and MPI."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from paceline.cli.arguments.schedule import size
from paceline.user_input import digits, shortened


def collectives(
    operations: Annotated[
        str,
        typer.Option(
            metavar="LIST", help="Operations, separated by commas, for example broadcast; or `all`."
        ),
    ] = "all_reduce",
    sizes: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            help="Sizes of the buffer per rank, separated by commas: in bytes, or with KiB, MiB, GiB (powers"
            " of 1024), kB, MB, GB (of 1000). Default: 4, 1KiB, 32KiB, 256KiB, 1MiB, 4MiB, 16MiB, 64MiB.",
            show_default=False,
        ),
    ] = "4,1KiB,32KiB,256KiB,1MiB,4MiB,16MiB,64MiB",
    ranks: Annotated[str, typer.Option(metavar="LIST", help="Numbers of ranks, separated by commas.")] = "2",
    peers: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            help="Libraries to compare with, separated by commas: gloo, mpi (mpi4py of this environment) and"
            " NAME=PYTHON (that Python's mpi4py, with mpiexec beside it). auto: gloo, and mpi if installed;"
            " none: no library.",
        ),
    ] = "auto",
    fabrics: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            help="Paceline's fabrics, separated by commas: native (shared memory), tcp (native without shared"
            " memory).",
        ),
    ] = "native",
    blocks: Annotated[
        int, typer.Option(metavar="N", help="Blocks of calls per library; the median is reported.", min=1)
    ] = 7,
    block_seconds: Annotated[
        float, typer.Option(metavar="SECONDS", help="Approximate duration of a block.")
    ] = 0.05,
    json_file: Annotated[
        Path | None,
        typer.Option(
            "--json",
            metavar="FILE",
            help="Write the results as JSON to FILE; `-` prints them instead of the table.",
        ),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Write diagrams, with the limit of memory copies, as a web page to FILE."
        ),
    ] = None,
) -> None:
    """Time collectives of Paceline, Gloo and MPI on this machine, side by side.

    Example: paceline bench collectives --operations all_reduce,all_gather --sizes 4,1MiB --ranks 2,4
    --peers gloo --html collectives.html
    """
    from rich.console import Console

    from paceline.bench import collectives as bench
    from paceline.report import collectives as report

    names = list(bench.OPERATIONS) if operations == "all" else _items(operations)
    console = Console(stderr=True)
    result = bench.measure(
        operations=names,
        sizes=[size(text) for text in _items(sizes)],
        ranks=[_whole("--ranks", text) for text in _items(ranks)],
        peers=bench.parse_peers(peers),
        fabrics=_items(fabrics),
        blocks=blocks,
        block_s=block_seconds,
        on_row=lambda row: console.print(
            f"[dim]{row.operation}, {row.ranks} ranks, {report.size_text(row.num_bytes)}: "
            f"{report.label(row)} {report.time_text(row.median_s)}[/dim]"
        ),
    )
    if json_file and str(json_file) == "-":
        typer.echo(result.to_json(), nl=False)
    else:
        report.show(result)
        if json_file:
            json_file.parent.mkdir(parents=True, exist_ok=True)
            json_file.write_text(result.to_json())
    if html:
        report.write(result, html)


def _items(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _whole(option: str, text: str) -> int:
    from paceline.errors import ConfigError

    number = digits(text)
    if number is None:
        raise ConfigError(f"{option}: {shortened(text)} is not a whole number")
    return number


def register(group: typer.Typer) -> None:
    """Add `paceline bench collectives` to the command line."""
    group.command()(collectives)
