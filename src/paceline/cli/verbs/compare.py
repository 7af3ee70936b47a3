"""`paceline compare`: one task, several strategies, equal conditions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from paceline.cli.arguments.job import FABRIC_HELP, THREADS_HELP
from paceline.spec import split_list

if TYPE_CHECKING:
    from paceline.bench.rows import Trial

_COMPUTE = "constant"
_NETWORK = "ethernet(gbit=1)"
_DEFAULT = "single,all_reduce,local_sgd(period=4),local_sgd(period=16)"


def compare(
    task: Annotated[
        str,
        typer.Argument(
            help="digits, mnist, shakespeare, or a Python file that defines build() -> paceline.Task.",
            metavar="TASK",
        ),
    ],
    workers: Annotated[
        int,
        typer.Option(
            "-n", "--workers", metavar="N", help="Worker processes per strategy; `single` always has one."
        ),
    ] = 2,
    strategies: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            help="Strategies to train, in this order, separated by commas. Those inside brackets do not"
            " count: 'single, diloco(period=16, rate=0.7)'."
            f" Default: {_DEFAULT.replace(',', ', ')}.",
            show_default=False,
        ),
    ] = _DEFAULT,
    epochs: Annotated[
        int | None,
        typer.Option(
            metavar="N", help="Passes over the training set. Default: the task's.", show_default=False
        ),
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="File or folder with the task's data, for example mnist.npz.", metavar="PATH"),
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Samples per step, summed over all workers. Default: the task's.",
            show_default=False,
        ),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            metavar="RATE", help="Learning rate of the optimizer. Default: the task's.", show_default=False
        ),
    ] = None,
    seed: Annotated[
        int, typer.Option(metavar="N", help="Seed of the initial weights and of the order of samples.")
    ] = 0,
    seconds_budget: Annotated[
        float | None,
        typer.Option(
            metavar="SECONDS",
            help="Compare accuracies after this training time. Default: that of the fastest strategy.",
            show_default=False,
        ),
    ] = None,
    epochs_budget: Annotated[
        float | None,
        typer.Option(
            metavar="N",
            help="Also compare accuracies after this many epochs. Default: half of --epochs.",
            show_default=False,
        ),
    ] = None,
    threads: Annotated[int | None, typer.Option(metavar="N", help=THREADS_HELP, show_default=False)] = None,
    fabric: Annotated[
        str | None,
        typer.Option(metavar="native|torch", help=FABRIC_HELP),
    ] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write all results as JSON.")
    ] = None,
    html_path: Annotated[
        Path | None,
        typer.Option("--html", metavar="FILE", help="Write a web page with a table and diagrams."),
    ] = None,
    simulate: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="Train on N simulated workers in one process, in simulated time, instead of -n processes.",
        ),
    ] = None,
    compute: Annotated[
        str,
        typer.Option(
            help="With --simulate: distribution of the seconds per minibatch, for example"
            " 'pareto(shape=3, minimum_s=0.01)'.",
            metavar="DISTRIBUTION",
        ),
    ] = _COMPUTE,
    network: Annotated[
        str,
        typer.Option(
            help="With --simulate: the network, for example 'cluster(hosts=4, local=2)'.",
            metavar="TOPOLOGY",
        ),
    ] = _NETWORK,
    faults: Annotated[
        str,
        typer.Option(
            help="With --simulate: faults, joined by +, for example 'kill(rank=3, at_s=1.5)'.",
            metavar="FAULTS",
        ),
    ] = "",
    record: Annotated[
        str,
        typer.Option(
            help="Write the order of parameter_server's messages to FILE, for --replay.", metavar="FILE"
        ),
    ] = "",
    replay: Annotated[
        str,
        typer.Option(
            help="Repeat the recorded order of messages in a simulation, bit for bit.", metavar="FILE"
        ),
    ] = "",
    trace: Annotated[
        Path | None,
        typer.Option(help="With --simulate: folder for event logs and Perfetto traces.", metavar="FOLDER"),
    ] = None,
    progress: Annotated[bool, typer.Option("--progress/--no-progress", help="Show progress bars.")] = True,
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
            raise ConfigError(f"--simulate: at least 1 virtual worker expected, got {simulate}")
        return
    defaults = {"compute": _COMPUTE, "network": _NETWORK, "faults": "", "trace": ""}
    for name, value in given.items():
        if value != defaults[name]:
            raise ConfigError(f"--{name} is for a simulated cluster: add --simulate N, or leave it out")


def register(app: typer.Typer) -> None:
    """Add `paceline compare` to the command line."""
    app.command("compare")(compare)
