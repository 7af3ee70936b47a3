"""`paceline compare`: one task, several strategies, equal conditions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from paceline.cli.arguments import compare as args
from paceline.spec import split_list

if TYPE_CHECKING:
    from paceline.bench.rows import Trial


def compare(
    task: args.TaskName,
    workers: args.Workers = 2,
    strategies: args.Strategies = args.DEFAULT_STRATEGIES,
    epochs: args.Epochs = None,
    data: args.Data = None,
    batch_size: args.BatchSize = None,
    learning_rate: args.LearningRate = None,
    seed: args.Seed = 0,
    seconds_budget: args.SecondsBudget = None,
    epochs_budget: args.EpochsBudget = None,
    threads: args.Threads = None,
    fabric: args.Fabric = None,
    json_path: args.JsonFile = None,
    html_path: args.HtmlFile = None,
    simulate: args.Simulate = None,
    compute: args.Compute = args.DEFAULT_COMPUTE,
    network: args.Network = args.DEFAULT_NETWORK,
    faults: args.Faults = "",
    record: args.Record = "",
    replay: args.Replay = "",
    trace: args.Trace = None,
    progress: args.Progress = True,
) -> None:
    """Train TASK once per strategy under equal conditions, and tell which strategy is best.

    Also tells whether to distribute the training at all. Reported for each strategy: throughput, best
    accuracy, accuracy after equal time and after equal epochs, bytes sent per sample, time spent waiting.
    Equal for all: global batch, initial weights, threads per worker.
    """
    for path in (json_path, html_path):
        _check_writable(path)
    _check_simulated(simulate, compute=compute, network=network, faults=faults, trace=str(trace or ""))
    import numpy  # noqa: F401  before torch: its own import of numpy swallows Ctrl-C

    from paceline.bench.compare import compare as compare_strategies
    from paceline.bench.virtual import VirtualCluster
    from paceline.report import page, table

    typer.echo(f"seed {seed}", err=True)
    comparison = compare_strategies(
        task,
        strategies=split_list(strategies),
        workers=workers if simulate is None else simulate,
        data=data,
        epochs=epochs,
        batch_size=batch_size,
        learning_rate=learning_rate,
        seed=seed,
        seconds_budget=seconds_budget,
        epochs_budget=epochs_budget,
        fabric=fabric,
        threads=threads,
        progress=progress,
        virtual=VirtualCluster(compute, network, faults, str(trace or "")) if simulate is not None else None,
        record=record,
        replay=replay,
        on_trial=_print_trial,
    )
    table.show(comparison)
    if json_path is not None:
        comparison.save(json_path)
        typer.echo(f"results: {json_path}")
    if html_path is not None:
        page.write(comparison, html_path)
        typer.echo(f"page: {html_path}")


def _print_trial(index: int, number: int, strategy: str, workers: int, trial: Trial | None) -> None:
    head = f"{index + 1}/{number} {strategy}"
    if trial is None:
        typer.echo(f"{head}: training on {workers} {'worker' if workers == 1 else 'workers'} …", err=True)
    else:
        typer.echo(
            f"{head}: best accuracy {100 * trial.best_accuracy:.2f} %, "
            f"{trial.samples_per_s:,.0f} samples/s, {trial.seconds:.3g} s of training",
            err=True,
        )


def _check_writable(path: Path | None) -> None:
    from paceline.errors import ConfigError

    if path is not None:
        if path.is_dir():
            raise ConfigError(f"{path} is a folder; a file name expected")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"folder {path.parent} cannot be created: {error.strerror}") from None


def _check_simulated(simulate: int | None, **given: str) -> None:
    """Refuse options of a simulation that would be ignored without --simulate, and fewer than 1 worker."""
    from paceline.errors import ConfigError

    if simulate is not None:
        if simulate < 1:
            raise ConfigError(f"--simulate: at least 1 simulated worker expected, got {simulate}")
        return
    defaults = {"compute": args.DEFAULT_COMPUTE, "network": args.DEFAULT_NETWORK, "faults": "", "trace": ""}
    for name, value in given.items():
        if value != defaults[name]:
            raise ConfigError(f"--{name} is for a simulated cluster: add --simulate N, or leave it out")


def register(app: typer.Typer) -> None:
    """Add `paceline compare` to the command line."""
    app.command("compare")(compare)
