"""`paceline run`: a script on many workers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from paceline import registry
from paceline.cli.arguments import job as args
from paceline.cli.arguments.job import COMPATIBILITY, ENGINE, LAUNCH, TRAIN
from paceline.errors import ConfigError

_EPILOG = (
    "Example: paceline run -n 4 --strategy 'local_sgd(period=16)' train.py --epochs 3. "
    "On several hosts, run the same line on each: paceline run --nodes 2 --rendezvous 10.0.0.1:29400 "
    "-n 4 train.py. Trust: whoever can reach the rendezvous port can join the job and learn its secret; keep "
    "the port inside your network, or give every host the same --secret-file."
)


def run(
    script: args.Script,
    arguments: args.Arguments = None,
    workers: args.Workers = 1,
    on: Annotated[
        str,
        typer.Option(
            metavar="ENGINE",
            help="What runs the workers: " + ", ".join(registry.names("paceline.launchers.engines")) + ".",
            rich_help_panel=LAUNCH,
        ),
    ] = "local",
    module: args.Module = False,
    nodes: args.Nodes = 1,
    rendezvous: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Where the hosts meet: an address of one of them.",
            rich_help_panel=LAUNCH,
        ),
    ] = None,
    secret_file: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="The job's secret, the same file on every host; by default the first host makes one "
            "and shares it through the rendezvous.",
            rich_help_panel=LAUNCH,
        ),
    ] = None,
    threads: args.Threads = None,
    max_restarts: args.MaxRestarts = None,
    grace: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help="From SIGTERM to SIGKILL when the job is stopped. Default: 30 with --checkpoint, else 5.",
            show_default=False,
            rich_help_panel=LAUNCH,
        ),
    ] = None,
    resources: args.ResourcesText = None,
    env: args.Environment = None,
    workdir: args.WorkingDirectory = None,
    ship: args.Ship = None,
    min_workers: args.MinWorkers = None,
    max_workers: args.MaxWorkers = None,
    name: args.Name = "paceline",
    engine_option: args.EngineOptions = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Print what the engine would be asked to do, and stop.", rich_help_panel=ENGINE
        ),
    ] = False,
    strategy: Annotated[
        str | None,
        typer.Option(
            metavar="SPEC",
            help="How to train, instead of what the script says; see `paceline strategies`.",
            rich_help_panel=TRAIN,
        ),
    ] = None,
    fabric: Annotated[
        str | None,
        typer.Option(
            metavar="native|torch",
            help="What carries the workers' tensors. Default: native; torch for models on a GPU.",
            rich_help_panel=TRAIN,
        ),
    ] = None,
    interface: Annotated[
        str,
        typer.Option(
            metavar="eth0,eth1",
            help="Network interfaces or addresses for the tensors. Default: the route to the other hosts.",
            rich_help_panel=TRAIN,
        ),
    ] = "",
    checkpoint: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="Resume from here if it exists; save here on SIGTERM.",
            rich_help_panel=TRAIN,
        ),
    ] = None,
    log_dir: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="Where `job.log` writes. Default: runs/<date>-<time>.",
            rich_help_panel=TRAIN,
        ),
    ] = None,
    log_to: Annotated[
        str | None,
        typer.Option(metavar="csv,jsonl,tensorboard", help="Formats of the log.", rich_help_panel=TRAIN),
    ] = None,
    progress: Annotated[
        bool, typer.Option("--progress/--no-progress", help="Show progress bars.", rich_help_panel=TRAIN)
    ] = True,
    as_horovod: Annotated[
        bool,
        typer.Option(
            "--as-horovod",
            help="`import horovod.torch` in SCRIPT means paceline.compat.horovod.",
            rich_help_panel=COMPATIBILITY,
        ),
    ] = False,
    as_apex: Annotated[
        bool,
        typer.Option(
            "--as-apex",
            help="`import apex` in SCRIPT means paceline.compat.apex.",
            rich_help_panel=COMPATIBILITY,
        ),
    ] = False,
    hosts: Annotated[
        str | None,
        typer.Option(
            "-H",
            "--hosts",
            metavar="HOST:SLOTS",
            help="As horovodrun takes it; only this host. For several use --nodes.",
            rich_help_panel=COMPATIBILITY,
        ),
    ] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Accepted; output is complete.", rich_help_panel=COMPATIBILITY)
    ] = False,
) -> None:
    """Run a training SCRIPT on several workers; everything after SCRIPT belongs to the script.

    Each line of output starts with its worker's rank. If a worker fails, the others are stopped, its
    traceback comes last, and the exit code is the worker's. Ctrl-C and SIGTERM stop all workers: they get
    SIGTERM and the grace time, e.g. to save a checkpoint.
    """
    from paceline.launchers import runner as engines
    from paceline.launchers.job import JobSpec
    from paceline.options import JobOptions

    engine = engines.make(on)
    folder = ship or workdir or Path()
    args.check(script, module=module, folder=folder, strategy=strategy, fabric=fabric)
    args.check_log_formats(log_to)
    if hosts is not None:
        _check_hosts(hosts, workers)
    job = JobSpec(
        command=(sys.executable, "-u", *(("-m",) if module else ()), script, *(arguments or [])),
        num_workers=workers,
        options=JobOptions(
            strategy=strategy,
            fabric=fabric,
            interface=interface,
            checkpoint=checkpoint,
            log_dir=log_dir,
            log_to=log_to,
            progress=progress,
        ),
        nodes=nodes,
        rendezvous=rendezvous,
        secret_file=secret_file,
        threads=threads,
        max_restarts=max_restarts,
        grace_s=grace,
        name=name,
        resources=args.parse_resources(resources),
        environment={**args.parse_environment(env), **args.stand_ins(horovod=as_horovod, apex=as_apex)},
        working_directory=workdir,
        ship=ship,
        min_workers=min_workers,
        max_workers=max_workers,
        engine_options=args.parse_pairs("--engine-option", engine_option),
        local_rank_option=None if module else args.local_rank_option(folder / script, arguments or []),
    )
    engine.check(job)
    if dry_run:
        typer.echo(engine.preview(job), nl=False)
        return
    raise typer.Exit(_run(engine, job))


def _run(engine: Any, job: Any) -> int:
    from paceline.launchers.processes.console import Console

    console = Console()
    outcome = engine.run(job, console=console)
    if outcome.failure is not None:
        outcome.failure.show(console)
    elif outcome.signal is not None:
        console.note(f"stopped by {outcome.signal.name}; no worker is left")
    return int(outcome.exit_code)


def _check_hosts(hosts: str, workers: int) -> None:
    """`-H localhost:4` is this host with room for four."""
    import socket

    here = {"localhost", "127.0.0.1", socket.gethostname(), socket.gethostname().split(".")[0]}
    name, _, slots = hosts.partition(":")
    if "," in hosts or name not in here:
        raise ConfigError(
            f"-H {hosts}: this command starts workers on this host only; run it on each host with "
            "--nodes N --rendezvous HOST:PORT"
        )
    if slots and (not slots.isdigit() or int(slots) < workers):
        raise ConfigError(f"-H {hosts}: room for {workers} workers (-np) expected, got {slots or 'none'}")


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command(
        "run",
        epilog=_EPILOG,
        context_settings={"allow_interspersed_args": False, "ignore_unknown_options": False},
    )(run)
