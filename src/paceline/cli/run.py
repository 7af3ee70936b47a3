"""`paceline run`: a script on many workers."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from paceline import registry
from paceline.errors import ConfigError
from paceline.spec import parse

_FABRICS = ("native", "torch")
_EPILOG = (
    "Example: paceline run -n 4 --strategy 'local_sgd(period=16)' train.py --epochs 3. "
    "On several hosts, run the same line on each: paceline run --nodes 2 --rendezvous 10.0.0.1:29400 "
    "-n 4 train.py. Trust: whoever can reach the rendezvous port can join the job and learn its secret; keep "
    "the port inside your network, or give every host the same --secret-file."
)

Launch = "Launch"
Train = "Training"
Compatibility = "Scripts of other projects"


def run(
    script: Annotated[
        str, typer.Argument(help="A Python file, or a module's name with -m.", metavar="SCRIPT")
    ],
    arguments: Annotated[
        list[str] | None, typer.Argument(help="Given to the script as they are.", metavar="[ARGS]...")
    ] = None,
    workers: Annotated[
        int,
        typer.Option("-n", "-np", "--workers", help="Worker processes on this host.", rich_help_panel=Launch),
    ] = 1,
    module: Annotated[
        bool, typer.Option("-m", "--module", help="SCRIPT is a module's name.", rich_help_panel=Launch)
    ] = False,
    nodes: Annotated[int, typer.Option(help="Hosts in this job.", rich_help_panel=Launch)] = 1,
    rendezvous: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT",
            help="Where the hosts meet: an address of one of them.",
            rich_help_panel=Launch,
        ),
    ] = None,
    secret_file: Annotated[
        Path | None,
        typer.Option(
            metavar="PATH",
            help="The job's secret, the same file on every host; by default the first host makes one "
            "and shares it through the rendezvous.",
            rich_help_panel=Launch,
        ),
    ] = None,
    threads: Annotated[
        int | None,
        typer.Option(
            help="Threads per worker (OMP_NUM_THREADS). Default: cores of this host / workers, at least 1.",
            show_default=False,
            rich_help_panel=Launch,
        ),
    ] = None,
    max_restarts: Annotated[
        int, typer.Option(help="Start all workers again after a failure, so often.", rich_help_panel=Launch)
    ] = 0,
    grace: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help="From SIGTERM to SIGKILL when the job is stopped. Default: 30 with --checkpoint, else 5.",
            show_default=False,
            rich_help_panel=Launch,
        ),
    ] = None,
    strategy: Annotated[
        str | None,
        typer.Option(
            metavar="SPEC",
            help="How to train, instead of what the script says; see `paceline strategies`.",
            rich_help_panel=Train,
        ),
    ] = None,
    fabric: Annotated[
        str | None,
        typer.Option(
            metavar="native|torch", help="What carries the workers' tensors.", rich_help_panel=Train
        ),
    ] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="Resume from here if it exists; save here on SIGTERM.",
            rich_help_panel=Train,
        ),
    ] = None,
    progress: Annotated[
        bool, typer.Option("--progress/--no-progress", help="Show progress bars.", rich_help_panel=Train)
    ] = True,
    as_horovod: Annotated[
        bool,
        typer.Option(
            "--as-horovod",
            help="`import horovod.torch` in SCRIPT means paceline.compat.horovod.",
            rich_help_panel=Compatibility,
        ),
    ] = False,
    as_apex: Annotated[
        bool,
        typer.Option(
            "--as-apex",
            help="`import apex` in SCRIPT means paceline.compat.apex.",
            rich_help_panel=Compatibility,
        ),
    ] = False,
    hosts: Annotated[
        str | None,
        typer.Option(
            "-H",
            "--hosts",
            metavar="HOST:SLOTS",
            help="As horovodrun takes it; only this host. For several use --nodes.",
            rich_help_panel=Compatibility,
        ),
    ] = None,
    verbose: Annotated[
        bool, typer.Option("--verbose", help="Accepted; output is complete.", rich_help_panel=Compatibility)
    ] = False,
) -> None:
    """Run a training SCRIPT on several workers; everything after SCRIPT belongs to the script.

    Each line of output starts with its worker's rank. If a worker fails, the others are stopped, its
    traceback comes last, and the exit code is the worker's. Ctrl-C and SIGTERM stop all workers: they get
    SIGTERM and the grace time, e.g. to save a checkpoint.
    """
    from paceline.launchers.job import JobSpec
    from paceline.launchers.local import quiet_torch
    from paceline.options import JobOptions

    quiet_torch()
    _check(script, module=module, strategy=strategy, fabric=fabric)
    if hosts is not None:
        _check_hosts(hosts, workers)
    job = JobSpec(
        command=(sys.executable, "-u", *(("-m",) if module else ()), script, *(arguments or [])),
        num_workers=workers,
        options=JobOptions(strategy=strategy, fabric=fabric, checkpoint=checkpoint, progress=progress),
        nodes=nodes,
        rendezvous=rendezvous,
        secret_file=secret_file,
        threads=threads,
        max_restarts=max_restarts,
        grace_s=grace,
        environment=_stand_ins(horovod=as_horovod, apex=as_apex),
        local_rank_option=None if module else _local_rank_option(Path(script), arguments or []),
    )
    raise typer.Exit(_run(job))


def _run(job: Any) -> int:
    from paceline.launchers.console import Console
    from paceline.launchers.local import run as run_job

    console = Console()
    outcome = run_job(job, console=console)
    if outcome.failure is not None:
        outcome.failure.show(console)
    elif outcome.signal is not None:
        console.note(f"stopped by {outcome.signal.name}; no worker is left")
    return outcome.exit_code


def _check(script: str, *, module: bool, strategy: str | None, fabric: str | None) -> None:
    """Find what is wrong before anything starts."""
    if module:
        sys.path.insert(0, "")
        try:
            found = importlib.util.find_spec(script)
        except (ImportError, ValueError):
            found = None
        finally:
            sys.path.remove("")
        if found is None:
            raise ConfigError(f"no module named {script!r} in {Path.cwd()} or on the Python path")
    elif not Path(script).is_file():
        what = "is a folder" if Path(script).is_dir() else "does not exist"
        raise ConfigError(f"script {script!r} {what} (looked in {Path.cwd()}); for a module use -m")
    if fabric is not None and fabric not in _FABRICS:
        raise ConfigError(f"--fabric {fabric!r}: {' or '.join(_FABRICS)} expected")
    if strategy is not None:
        parsed = parse(strategy)
        if parsed.name not in (known := registry.names("paceline.strategies")):  # before torch is imported
            raise ConfigError(registry.unknown("strategy", parsed.name, known))
        from paceline.strategies.strategy import make

        make(strategy)


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


def _local_rank_option(script: Path, arguments: list[str]) -> str | None:
    """The option by which an older script wants its local rank: the one that its own parser declares."""
    import ast

    try:
        tree = ast.parse(script.read_text())
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return None  # the worker will say what is wrong with it
    declared = {
        argument.value
        for call in ast.walk(tree)
        if isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "add_argument"
        for argument in call.args
        if isinstance(argument, ast.Constant)
    }
    wanted = [o for o in ("--local_rank", "--local-rank") if o in declared]
    given = any(a.startswith(("--local_rank", "--local-rank")) for a in arguments)
    return wanted[0] if wanted and not given else None


def _stand_ins(*, horovod: bool, apex: bool) -> dict[str, str]:
    """Put packages that answer to other projects' names first on the workers' Python path."""
    import os

    compat = Path(__file__).resolve().parents[1] / "compat"
    wanted = [str(compat / n / "stand_in") for n, yes in (("horovod", horovod), ("apex", apex)) if yes]
    if not wanted:
        return {}
    given = os.environ.get("PYTHONPATH")
    return {"PYTHONPATH": os.pathsep.join([*wanted, *([given] if given else [])])}


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command(
        "run",
        epilog=_EPILOG,
        context_settings={"allow_interspersed_args": False, "ignore_unknown_options": False},
    )(run)
