"""`paceline schedule`: list, show, verify, simulate, compare collective algorithms. Never imports torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from paceline.cli import schedule_reports as reports
from paceline.cli.arguments import schedule as arguments
from paceline.cli.arguments.plugins import Plugins

app = typer.Typer(
    name="schedule",
    help="List, show, verify, simulate and compare collective algorithms.",
    no_args_is_help=True,
)

Name = Annotated[
    str,
    typer.Argument(
        metavar="NAME",
        help="Algorithm, with options if any: ring, 'ring_chunked(segments=4)', or your own ./zigzag.py.",
    ),
]
Operation = Annotated[
    str, typer.Option(metavar="OPERATION", help="For example all_reduce, broadcast or all_to_all.")
]
Network = Annotated[
    str,
    typer.Option(
        "--topology",
        "--network",
        "-t",
        metavar="TOPOLOGY",
        help="The network: ethernet, cluster, dgx1, dumbbell, fully_connected, hypercube, random, ring,"
        " shared_memory or torus, with options if any: 'cluster(hosts=4, local=2)'; or FILE.json.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]
Root = Annotated[int, typer.Option(metavar="RANK", help="Root of broadcast, reduce, gather, scatter.")]
Channels = Annotated[
    int,
    typer.Option(metavar="N", min=1, help="Parallel copies of the algorithm, each on a part of every chunk."),
]
Ranks = Annotated[
    int | None,
    typer.Option(
        metavar="P",
        min=1,
        help="Number of ranks. Default: the topology's; ethernet and others without one need it.",
    ),
]
Late = Annotated[
    list[str] | None,
    typer.Option(metavar="RANK:SECONDS", help="Start a rank SECONDS late, e.g. 3:0.01. Repeatable."),
]
Straggler = Annotated[
    list[str] | None,
    typer.Option(metavar="RANK:FACTOR", help="Make a rank FACTOR times slower, e.g. 3:2.5. Repeatable."),
]
SlowLink = Annotated[
    list[str] | None,
    typer.Option(
        metavar="SRC-DST:FACTOR", help="Slow the link from SRC to DST by FACTOR, e.g. 0-1:10. Repeatable."
    ),
]

_ONE_FILE = "Write the {} to this file; only files named so are written, none to --output."
_SIZES = "64, 1kB, 8kB, 64kB, 512kB, 4MB, 32MB, 256MB"
_DEFAULT_NETWORK = "ethernet(gbit=10)"


def register(root: typer.Typer) -> None:
    """Add `paceline schedule` to the command line."""
    root.add_typer(app)


@app.command("list")
def list_algorithms(
    operation: Annotated[
        str | None, typer.Option(metavar="OPERATION", help="List only algorithms for this operation.")
    ] = None,
    plugin: Plugins = None,
    as_json: Json = False,
) -> None:
    """List every algorithm: operations, supported numbers of ranks, cost, source, options."""
    reports.print_list(operation, as_json=as_json)


@app.command()
def show(
    name: Name,
    operation: Operation = "all_reduce",
    ranks: Annotated[int, typer.Option(metavar="P", min=1, help="Number of ranks P.")] = 8,
    root: Root = 0,
    channels: Channels = 1,
    topology: Network = _DEFAULT_NETWORK,
    size: Annotated[
        str, typer.Option("--bytes", metavar="SIZE", help="Buffer size in the trace, in bytes or as 64MiB.")
    ] = "1MB",
    output: Annotated[
        Path,
        typer.Option("--output", "-o", metavar="FOLDER", help="Folder for the SVG, HTML and trace files."),
    ] = Path(),
    svg: Annotated[Path | None, typer.Option(metavar="FILE", help=_ONE_FILE.format("SVG diagram"))] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help=_ONE_FILE.format("web page"))] = None,
    trace: Annotated[Path | None, typer.Option(metavar="FILE", help=_ONE_FILE.format("trace"))] = None,
    plugin: Plugins = None,
    as_json: Json = False,
) -> None:
    """Print an algorithm's steps; write a space-time diagram (SVG, HTML) and a trace for ui.perfetto.dev."""
    files = {"svg": svg, "html": html, "trace": trace}
    chosen, options = arguments.algorithm(name, channels=channels)
    report = reports.show(
        chosen,
        options,
        operation=operation,
        num_ranks=ranks,
        root=root,
        topology=topology,
        num_bytes=arguments.size(size),
        folder=output,
        files=files,
    )
    if as_json:
        typer.echo(json.dumps(report))
        return
    for line in report["text"]:
        typer.echo(line)
    for kind, path in report["files"].items():
        typer.echo(f"{kind}: {path}", err=True)


@app.command()
def verify(
    name: Annotated[
        str | None, typer.Argument(metavar="NAME", help="The algorithm to verify; or give --all.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="Verify every algorithm.")] = False,
    operation: Annotated[
        str | None, typer.Option(metavar="OPERATION", help="Verify only this operation (default: all).")
    ] = None,
    ranks: Annotated[str, typer.Option(metavar="RANKS", help="Numbers of ranks: 1..17, or 2,4,8.")] = "1..17",
    plugin: Plugins = None,
    as_json: Json = False,
) -> None:
    """Prove algorithms correct, in every form and for every root; exit code 1 if one is not.

    The C++ core executes staged forms, in which data travels in messages. Zero-copy forms, in which ranks
    read each other's buffers, are only modelled; they are verified too.
    """
    from paceline.cli import schedule_verify

    schedule_verify.run(name, every=every, operation=operation, ranks=arguments.ranks(ranks), as_json=as_json)


@app.command()
def simulate(
    name: Name,
    operation: Operation = "all_reduce",
    ranks: Ranks = None,
    size: Annotated[
        str, typer.Option("--bytes", metavar="SIZE", help="Bytes of the full buffer: 100000000, 64MiB …")
    ] = "1MB",
    topology: Network = _DEFAULT_NETWORK,
    root: Root = 0,
    channels: Channels = 1,
    late: Late = None,
    straggler: Straggler = None,
    slow_link: SlowLink = None,
    trace: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a trace for ui.perfetto.dev.")
    ] = None,
    per_rank: Annotated[
        bool, typer.Option("--per-rank", help="With --json: add every rank's finish time and bytes.")
    ] = False,
    plugin: Plugins = None,
    as_json: Json = False,
) -> None:
    """Simulate one algorithm on a topology, with late ranks, stragglers and slow links."""
    chosen, options = arguments.algorithm(name, channels=channels)
    report = reports.simulate(
        chosen,
        options,
        operation=operation,
        num_ranks=ranks,
        num_bytes=arguments.size(size),
        topology=topology,
        root=root,
        conditions=arguments.conditions(late or [], straggler or [], slow_link or []),
        trace=trace,
        per_rank=per_rank,
    )
    typer.echo(json.dumps(report) if as_json else reports.describe(report))


@app.command()
def compare(
    operation: Operation = "all_reduce",
    ranks: Ranks = None,
    topology: Network = _DEFAULT_NETWORK,
    sizes: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            help=f"Buffer sizes in bytes or with units, separated by commas. Default: {_SIZES}.",
            show_default=False,
        ),
    ] = _SIZES,
    algorithms: Annotated[
        str | None,
        typer.Option(metavar="LIST", help="Compare only these, separated by commas, with options if any."),
    ] = None,
    root: Root = 0,
    late: Late = None,
    straggler: Straggler = None,
    slow_link: SlowLink = None,
    plugin: Plugins = None,
    as_json: Json = False,
) -> None:
    """Find the fastest algorithm for each size on a topology, and the crossovers."""
    report: dict[str, Any] = reports.compare(
        operation=operation,
        num_ranks=ranks,
        topology=topology,
        sizes=[arguments.size(s.strip()) for s in sizes.split(",")],
        algorithms=algorithms,
        root=root,
        conditions=arguments.conditions(late or [], straggler or [], slow_link or []),
    )
    if as_json:
        typer.echo(json.dumps(report))
    else:
        reports.print_comparison(report)
