"""`paceline bench imagenet`: every way of training, in turn, on the same images."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from paceline.cli.arguments.plugins import Plugins

if TYPE_CHECKING:
    from rich.console import Console

_TABLE_WIDTH = 130
_WAY_WIDTH = 32


def imagenet(
    data: Annotated[
        Path | None,
        typer.Argument(metavar="DATA", help="Folder with train/CLASS/*.jpg and val/CLASS/*.jpg."),
    ] = None,
    synthetic: Annotated[
        bool, typer.Option("--synthetic", help="Train on generated images instead of a folder.")
    ] = False,
    workers: Annotated[
        int, typer.Option(metavar="N", help="Workers, for methods with more than one.", min=1)
    ] = 2,
    epochs: Annotated[
        int, typer.Option(metavar="N", help="Epochs; if several, the first is not timed.", min=1)
    ] = 2,
    repeats: Annotated[
        int, typer.Option(metavar="N", help="Runs per method, interleaved; medians are reported.", min=1)
    ] = 3,
    batch_size: Annotated[
        int,
        typer.Option(metavar="N", help="Samples per step over all workers: a multiple of --workers.", min=1),
    ] = 64,
    arch: Annotated[
        str, typer.Option(metavar="NAME", help="A model in examples/imagenet/model.py or timm.")
    ] = "resnet10_narrow",
    image_size: Annotated[
        int, typer.Option(metavar="N", help="Width and height of images, in pixels.", min=16)
    ] = 64,
    train_samples: Annotated[
        int, typer.Option(metavar="N", help="With --synthetic: number of training images.", min=1)
    ] = 1024,
    plugin: Plugins = None,
    strategies: Annotated[
        str,
        typer.Option(
            metavar="LIST",
            help="Strategies to compare with Paceline, separated by commas. Default: all_reduce,"
            " local_sgd(period=8).",
            show_default=False,
        ),
    ] = "all_reduce,local_sgd(period=8)",
    threads: Annotated[
        int | None, typer.Option(metavar="N", help="Threads per worker. Default: cores / workers.")
    ] = None,
    scripts: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Folder with the training scripts. Default: examples/imagenet of a source checkout; needed"
            " without one.",
        ),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Write the results as JSON to FILE.")
    ] = None,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Write a diagram as a web page to FILE.")
    ] = None,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", help="Time limit of one run.")] = 600,
) -> None:
    """Time common methods of training on ImageNet, side by side, on the same data.

    Give DATA or --synthetic. Reported for each method: seconds per epoch, images per second, efficiency
    compared with one process that uses all cores, peak memory, bytes sent, evaluation time and accuracy.
    Without GPUs DataParallel has no effect; its row says so.
    """
    import os

    from rich.console import Console

    from paceline import declarations
    from paceline.bench import imagenet as bench
    from paceline.errors import ConfigError
    from paceline.spec import split_list

    if (data is None) == (not synthetic):
        raise ConfigError("give either a folder of images or --synthetic")
    if data is not None and not data.is_dir():
        raise ConfigError(f"{data} is not a folder")
    if batch_size % workers:
        raise ConfigError(f"--batch-size {batch_size} is not divisible by {workers} workers")
    folder, names = bench.scripts_folder(scripts), split_list(strategies)
    for name in names:
        declarations.check("paceline.strategies", name)
    from paceline.strategies.base.strategy import make  # needs torch, and knows the values

    for name in names:
        make(name)
    cores = threads or max(1, len(os.sched_getaffinity(0)) // workers)
    common = ["--synthetic", "--train-samples", str(train_samples), "--val-samples", str(train_samples // 4)]
    arguments = [str(data)] if data else common
    arguments += ["--arch", arch, "--image-size", str(image_size), "--epochs", str(epochs)]
    arguments += ["--warmup-epochs", "1", "--loader-workers", "0"]
    console = Console()
    console.width = max(console.width, _TABLE_WIDTH)  # a narrow terminal wraps lines; no column is cut
    rows: dict[str, list[dict[str, Any]]] = {}
    every = bench.ways(names)
    # Alternate: a slow minute of the machine then hits all ways alike.
    for repeat in range(repeats):
        for way in every:
            console.print(f"[dim]run {repeat + 1}/{repeats}: {way.name}[/dim]")
            share = batch_size // (way.workers or workers)
            row = bench.run(
                way,
                folder,
                workers=workers,
                threads=cores,
                arguments=[*arguments, "--batch-size", str(share)],
                timeout_s=timeout,
            )
            rows.setdefault(way.name, []).append(row)
    results = summarise(rows)
    _show(console, results)
    document = {"workers": workers, "threads_per_worker": cores, "batch_size": batch_size, "results": results}
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(document, indent=1))
    if html is not None:
        from paceline.report.imagenet import page

        html.parent.mkdir(parents=True, exist_ok=True)
        html.write_text(page(document))


def summarise(runs: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Return one row per way: medians over its runs, efficiency, and the ratio to DDP under a launcher."""
    rows = []
    for name, each in runs.items():
        row = dict(each[-1], way=name, runs=len(each))
        for key in ("seconds_per_epoch", "samples_per_s", "evaluation_s"):
            row[key] = statistics.median(r[key] for r in each)
        rows.append(row)
    alone = next((r for r in rows if r["way"] == "one process"), None)
    ddp = runs.get("DDP, launcher")
    for row in rows:
        row["efficiency"] = row["samples_per_s"] / alone["samples_per_s"] if alone else None
        # Paired: run i of both happened close together.
        row["speed_over_ddp"] = ddp and statistics.median(
            a["samples_per_s"] / b["samples_per_s"] for a, b in zip(runs[row["way"]], ddp, strict=True)
        )
    return rows


def _show(console: Console, rows: list[dict[str, Any]]) -> None:
    from rich.table import Table

    from paceline.report import line_breaks

    table = Table(title="Ways of training on the same images")
    columns = (
        "way",
        "workers",
        "s/epoch",
        "images/s",
        "of 1 process",
        "× DDP",
        "eval s",
        "peak MB",
        "MB sent",
        "top-1",
    )
    for column in columns:
        table.add_column(column, justify="left" if column == "way" else "right", no_wrap=column == "way")
    for r in rows:
        table.add_row(
            "\n".join(line_breaks.lines(r["way"], _WAY_WIDTH)) + (" *" if r["note"] else ""),
            str(r["workers"]),
            f"{r['seconds_per_epoch']:.2f}",
            f"{r['samples_per_s']:.0f}",
            f"{r['efficiency']:.0%}",
            f"{r['speed_over_ddp']:.2f}",
            f"{r['evaluation_s']:.2f}",
            f"{r['peak_memory_bytes'] / 1e6:.0f}",
            f"{r['bytes_sent_per_worker'] / 1e6:.1f}",
            f"{r['top1']:.3f}",
        )
    console.print(table)
    for note in sorted({f"* {r['way']}: {r['note']}" for r in rows if r["note"]}):
        console.print(note)


def register(app: typer.Typer) -> None:
    """Add `paceline bench imagenet` to the command line."""
    app.command("imagenet")(imagenet)
