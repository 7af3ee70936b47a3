"""`paceline compare`: one task, several strategies, equal conditions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import typer

from paceline.cli.arguments import compare as args
from paceline.cli.arguments.plugins import Plugins
from paceline.spec import split_list

if TYPE_CHECKING:
    from paceline.bench.rows import Comparison, Trial


def compare(
    task: args.TaskName,
    workers: args.Workers = 2,
    strategies: args.Strategies = args.DEFAULT_STRATEGIES,
    plugin: Plugins = None,
    epochs: args.Epochs = None,
    data: args.Data = None,
    batch_size: args.BatchSize = None,
    learning_rate: args.LearningRate = None,
    seed: args.Seed = 0,
    seconds_budget: args.SecondsBudget = None,
    epochs_budget: args.EpochsBudget = None,
    validation: args.Validation = 0.0,
    threads: args.Threads = None,
    fabric: args.Fabric = None,
    json_path: args.JsonFile = None,
    html_path: args.HtmlFile = None,
    simulate: args.Simulate = None,
    compute: args.Compute = args.DEFAULT_COMPUTE,
    codec_cost: args.CodecCost = args.DEFAULT_CODEC_COST,
    network: args.Network = args.DEFAULT_NETWORK,
    faults: args.Faults = "",
    record: args.Record = "",
    replay: args.Replay = "",
    trace: args.Trace = None,
    progress: args.Progress = True,
) -> None:
    """Train TASK once per strategy under equal conditions, and report which is best.

    Also tells whether to distribute the training at all. Reported for each strategy: throughput, best
    accuracy, accuracy after equal time and after equal epochs, bytes sent per sample, time spent waiting.
    Equal for all: global batch, initial weights, total cores. --json and --html are written after each
    strategy; if one fails, the others are kept, and the exit code is 1.
    """
    from paceline.bench import arguments
    from paceline.cli.arguments import values
    from paceline.tasks import names

    # All that can be known without torch first: a mistake is told at once.
    for path in (json_path, html_path):
        _check_writable(path)
    _check_simulated(
        simulate,
        compute=compute,
        codec_cost=codec_cost,
        network=network,
        faults=faults,
        trace=str(trace or ""),
    )
    names.check_name(task)
    if data is not None:
        names.check_data(task, data)
    values.check_training(None, fabric)
    arguments.check_numbers(workers=workers, epochs=epochs, batch_size=batch_size, threads=threads)
    arguments.check_positive(
        learning_rate=learning_rate, seconds_budget=seconds_budget, epochs_budget=epochs_budget
    )
    arguments.check_share(validation)
    arguments.check_strategies(split_list(strategies), record=record, replay=replay)
    if simulate is not None:
        if codec_cost not in ("measured", "none"):
            arguments.check_file(codec_cost, "--codec-cost")
        arguments.check_cluster(compute, network, faults, str(trace or ""), sizes=[simulate], seed=seed)
    import numpy  # noqa: F401  before torch: its own import of numpy swallows Ctrl-C

    from paceline.bench.compare import compare as compare_strategies
    from paceline.bench.virtual import VirtualCluster
    from paceline.report import page, table

    def write(so_far: Comparison) -> None:
        """After each strategy, so that an interrupted comparison keeps what it has."""
        if json_path is not None:
            so_far.save(json_path)
        if html_path is not None:
            page.write(so_far, html_path)

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
        validation=validation,
        fabric=fabric,
        threads=threads,
        progress=progress,
        virtual=None
        if simulate is None
        else VirtualCluster(compute, network, faults, str(trace or ""), codec_cost),
        record=record,
        replay=replay,
        on_note=_print_note,
        on_trial=_print_trial,
        on_result=write,
    )
    table.show(comparison)
    write(comparison)  # a strategy may have failed after the last result
    for what, path in (("results", json_path), ("page", html_path)):
        if path is not None:
            typer.echo(f"{what}: {path}")
    if comparison.failures:
        raise typer.Exit(1)


def _print_note(text: str) -> None:
    typer.secho(text, fg=typer.colors.YELLOW, err=True)


def _print_trial(index: int, number: int, strategy: str, workers: int, trial: Trial | None) -> None:
    head = f"{index + 1}/{number} {strategy}"
    if trial is None:
        typer.echo(f"{head}: training on {workers} {'worker' if workers == 1 else 'workers'} …", err=True)
    else:
        typer.echo(
            f"{head}: best test accuracy {100 * trial.best_accuracy:.2f} %, "
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
    defaults = {
        "compute": args.DEFAULT_COMPUTE,
        "codec_cost": args.DEFAULT_CODEC_COST,
        "network": args.DEFAULT_NETWORK,
        "faults": "",
        "trace": "",
    }
    for name, value in given.items():
        if value != defaults[name]:
            raise ConfigError(
                f"--{name.replace('_', '-')} is for a simulated cluster: add --simulate N, or leave it out"
            )


def register(app: typer.Typer) -> None:
    """Add `paceline compare` to the command line."""
    app.command("compare")(compare)
