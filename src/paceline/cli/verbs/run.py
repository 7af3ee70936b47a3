"""`paceline run`: a script on many workers."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from paceline.cli.arguments import job as args
from paceline.cli.arguments.plugins import Plugins
from paceline.errors import ConfigError
from paceline.user_input import digits

if TYPE_CHECKING:
    from paceline.launchers.job import JobSpec
    from paceline.launchers.runner import Runner

_EPILOG = (
    "Example: paceline run -n 4 --strategy 'local_sgd(period=16)' train.py\n\n"
    "On each of several hosts: paceline run --nodes 2 --rendezvous 10.0.0.1:29400 -n 4 train.py\n\n"
    "All hosts need the same key: ~/.config/paceline/key, which is made when it is first needed, or"
    " --secret-file. Copy the key to hosts that do not share the home folder."
)


def run(
    script: args.Script,
    arguments: args.Arguments = None,
    workers: args.Workers = 1,
    on: args.Engine = "local",
    module: args.Module = False,
    nodes: args.Nodes = 1,
    rendezvous: args.Rendezvous = None,
    secret_file: args.SecretFile = None,
    threads: args.Threads = None,
    max_restarts: args.MaxRestarts = None,
    grace: args.Grace = None,
    resources: args.ResourcesText = None,
    env: args.Environment = None,
    workdir: args.WorkingDirectory = None,
    ship: args.Ship = None,
    min_workers: args.MinWorkers = None,
    max_workers: args.MaxWorkers = None,
    name: args.Name = "paceline",
    engine_option: args.EngineOptions = None,
    dry_run: args.DryRun = False,
    strategy: args.Strategy = None,
    fabric: args.Fabric = None,
    interface: args.Interface = "",
    checkpoint: args.Checkpoint = None,
    log_dir: args.LogFolder = None,
    log_to: args.LogFormats = None,
    progress: args.Progress = True,
    plugin: Plugins = None,
    as_horovod: args.AsHorovod = False,
    as_apex: args.AsApex = False,
    hosts: args.HorovodHosts = None,
    verbose: args.Verbose = False,
) -> None:
    """Run a training SCRIPT on several workers. Arguments after SCRIPT are passed to the script.

    Each line of output starts with the rank of its worker. If a worker fails, the others are stopped, its
    traceback is printed last, and its exit code becomes that of this command. Ctrl-C and SIGTERM stop all
    workers: each gets SIGTERM, so that it can save a checkpoint, and SIGKILL after --grace seconds.
    """
    from paceline.cli.arguments import values
    from paceline.launchers import runner as runners
    from paceline.launchers.job import JobSpec
    from paceline.options import JobOptions

    runner = runners.make(on)
    folder = ship or workdir or Path()
    values.check_script(script, module=module, folder=folder)
    values.check_training(strategy, fabric)
    values.check_log_formats(log_to)
    if hosts is not None:
        _check_hosts(hosts, workers, on)
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
        resources=values.parse_resources(resources),
        environment={**values.parse_environment(env), **values.stand_ins(horovod=as_horovod, apex=as_apex)},
        working_directory=workdir,
        ship=ship,
        min_workers=min_workers,
        max_workers=max_workers,
        engine_options=values.parse_pairs("--engine-option", engine_option),
        local_rank_option=None if module else values.local_rank_option(folder / script, arguments or []),
    )
    runner.check(job)
    if strategy is not None:  # last, because it needs torch
        runner.load()
        values.check_strategy_values(strategy)
    if dry_run:
        typer.echo(runner.preview(job), nl=False)
        return
    raise typer.Exit(_run_and_report(runner, job))


def _run_and_report(runner: Runner, job: JobSpec) -> int:
    """Run the job, print why it failed or stopped, and return the exit code."""
    from paceline.launchers.processes.console import Console

    console = Console()
    outcome = runner.run(job, console=console)
    if outcome.failure is not None:
        outcome.failure.show(console)
    elif outcome.signal is not None:
        console.note(f"stopped by {outcome.signal.name}; no worker is left")
    return outcome.exit_code


def _check_hosts(hosts: str, workers: int, on: str) -> None:
    """Check horovodrun's `-H`: localhost:4 is this host with slots for four workers."""
    if on != "local":
        raise ConfigError(f"-H {hosts}: only for --on local; {on} chooses the hosts by its own options")
    own_names = {"localhost", "127.0.0.1", socket.gethostname(), socket.gethostname().split(".")[0]}
    name, _, slots = hosts.partition(":")
    if "," in hosts or name not in own_names:
        raise ConfigError(
            f"-H {hosts}: this command starts workers on this host only; run it on each host with "
            "--nodes N --rendezvous HOST:PORT"
        )
    if slots and (digits(slots) or 0) < workers:
        raise ConfigError(f"-H {hosts}: slots for {workers} workers (-np) expected, got {slots or 'none'}")


def register(app: typer.Typer) -> None:
    """Add `paceline run` to the command line."""
    app.command(
        "run",
        epilog=_EPILOG,
        context_settings={"allow_interspersed_args": False, "ignore_unknown_options": False},
    )(run)
