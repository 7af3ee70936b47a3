"""`paceline compare`: one task, several strategies, equal conditions."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from paceline.spec import split_list

if TYPE_CHECKING:
    from paceline.bench.rows import Trial

_COMPUTE, _NETWORK = "constant", "ethernet(gbit=1)"
_DEFAULT = "single,all_reduce,local_sgd(period=4),local_sgd(period=16)"


def compare(
    task: Annotated[
        str,
        typer.Argument(
            help="digits, mnist, shakespeare, or a file.py that defines build() -> paceline.Task.",
            metavar="TASK",
        ),
    ],
    workers: Annotated[
        int, typer.Option("-n", "--workers", help="Worker processes for each strategy; single takes one.")
    ] = 2,
    strategies: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            help="Separated by commas; commas inside brackets do not split; run in this order.",
        ),
    ] = _DEFAULT,
    epochs: Annotated[
        int | None,
        typer.Option(help="Passes over the training set. Default: the task's.", show_default=False),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="The task's data, e.g. mnist.npz.", metavar="PATH")
    ] = None,
    batch_size: Annotated[
        int | None,
        typer.Option(help="Samples per step over all workers. Default: the task's.", show_default=False),
    ] = None,
    learning_rate: Annotated[
        float | None, typer.Option(help="Instead of the task's own.", show_default=False)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of initial weights and order of data.")] = 0,
    seconds_budget: Annotated[
        float | None,
        typer.Option(
            help="Compare accuracies after this training time. Default: the time of the fastest strategy.",
            show_default=False,
        ),
    ] = None,
    epochs_budget: Annotated[
        float | None,
        typer.Option(help="And after so many epochs. Default: half of them.", show_default=False),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="Per worker. Default: cores / workers.", show_default=False)
    ] = None,
    fabric: Annotated[
        str | None,
        typer.Option(
            metavar="native|torch",
            help="What carries the workers' tensors. Default: native; torch for models on a GPU.",
        ),
    ] = None,
    json_path: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write all figures as JSON.")
    ] = None,
    html_path: Annotated[
        Path | None, typer.Option("--html", metavar="FILE", help="Write a page with table and pictures.")
    ] = None,
    simulate: Annotated[
        int | None,
        typer.Option(metavar="N", help="N virtual workers instead of processes; seconds are virtual."),
    ] = None,
    compute: Annotated[
        str,
        typer.Option(help="Simulated seconds per minibatch: constant, pareto(shape=3), …", metavar="DIST"),
    ] = _COMPUTE,
    network: Annotated[
        str, typer.Option(help="Simulated network: ethernet(gbit=1), cluster(hosts=4, local=2), …")
    ] = _NETWORK,
    faults: Annotated[str, typer.Option(help="Simulated faults: kill(rank=3, at_s=1.5)+…")] = "",
    record: Annotated[
        str, typer.Option(help="Keep the message order of parameter_server.", metavar="FILE")
    ] = "",
    replay: Annotated[
        str, typer.Option(help="Repeat a recorded order in simulation, bit for bit.", metavar="FILE")
    ] = "",
    trace: Annotated[
        Path | None, typer.Option(help="Folder for event logs and Perfetto traces of a simulation.")
    ] = None,
    progress: Annotated[bool, typer.Option("--progress/--no-progress", help="Show progress bars.")] = True,
) -> None:
    """Train TASK once per strategy under equal conditions and say which is best, and whether to distribute.

    Reported for each: throughput, best accuracy, accuracy at a time budget, accuracy at an epoch budget,
    bytes sent per sample, time waited. Equal for all: global batch, initial weights, threads per worker.
    """
    for path in (json_path, html_path):
        _check_writable(path)
    _check_simulated(simulate, compute=compute, network=network, faults=faults, trace=str(trace or ""))
    import numpy  # noqa: F401  before torch: its own import of numpy swallows Ctrl-C

    from paceline.bench.compare import compare as run
    from paceline.bench.virtual import VirtualCluster
    from paceline.report import page, table

    typer.echo(f"seed {seed}", err=True)
    comparison = run(
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
        on_trial=_tell,
    )
    table.show(comparison)
    if json_path is not None:
        comparison.save(json_path)
        typer.echo(f"figures: {json_path}")
    if html_path is not None:
        page.write(comparison, html_path)
        typer.echo(f"page: {html_path}")


def _tell(index: int, number: int, strategy: str, workers: int, trial: Trial | None) -> None:
    head = f"{index + 1}/{number} {strategy}"
    if trial is None:
        typer.echo(f"{head}: training on {workers} {'worker' if workers == 1 else 'workers'} …", err=True)
    else:
        typer.echo(
            f"{head}: accuracy {100 * trial.best_accuracy:.2f} % at best, "
            f"{trial.samples_per_s:,.0f} samples/s, {trial.seconds:.3g} s of training",
            err=True,
        )


def _check_writable(path: Path | None) -> None:
    from paceline.errors import ConfigError

    if path is not None:
        if path.is_dir():
            raise ConfigError(f"{path} is a folder; the name of a file expected")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"{path.parent} cannot be made: {error.strerror}") from None


def _check_simulated(simulate: int | None, **given: str) -> None:
    """Conditions of a simulation without one would be ignored, and a number below 1 makes none."""
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
    """Add the verb."""
    app.command("compare")(compare)
