"""Options of `paceline compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from paceline.cli.arguments.job import FABRIC_HELP

DEFAULT_STRATEGIES = "single,all_reduce,local_sgd(period=4),local_sgd(period=16)"
DEFAULT_COMPUTE = "measured"
DEFAULT_CODEC_COST = "measured"
DEFAULT_NETWORK = "ethernet(gbit=1, message_us=10)"
SIMULATION = "Simulation"

TaskName = Annotated[
    str,
    typer.Argument(
        help="digits, mnist, shakespeare, or a Python file that defines build() -> paceline.Task.",
        metavar="TASK",
    ),
]
Workers = Annotated[
    int,
    typer.Option(
        "-n", "--workers", metavar="N", help="Worker processes per strategy; `single` always has one."
    ),
]
Strategies = Annotated[
    str,
    typer.Option(
        metavar="LIST",
        help="Strategies to compare, in this order, separated by commas. Commas inside parentheses do not"
        " separate: 'single, diloco(period=16, rate=0.7)'."
        f" Default: {DEFAULT_STRATEGIES.replace(',', ', ')}.",
        show_default=False,
    ),
]
Epochs = Annotated[
    int | None,
    typer.Option(metavar="N", help="Passes over the training set. Default: the task's.", show_default=False),
]
Data = Annotated[
    Path | None,
    typer.Option(
        help="The task's data. Required for mnist (an .npz file) and shakespeare (a text file).",
        metavar="PATH",
    ),
]
BatchSize = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Samples per step, summed over all workers. Default: the task's.",
        show_default=False,
    ),
]
LearningRate = Annotated[
    float | None,
    typer.Option(
        metavar="RATE", help="Learning rate of the optimizer. Default: the task's.", show_default=False
    ),
]
Seed = Annotated[
    int, typer.Option(metavar="N", help="Seed of the initial weights and of the order of samples.")
]
SecondsBudget = Annotated[
    float | None,
    typer.Option(
        metavar="SECONDS",
        help="Compare accuracies after this training time, interpolated between evaluations. Default: that"
        " of the fastest strategy.",
        show_default=False,
    ),
]
EpochsBudget = Annotated[
    float | None,
    typer.Option(
        metavar="N",
        help="Also compare accuracies after this many epochs. Default: half of --epochs.",
        show_default=False,
    ),
]
Validation = Annotated[
    float,
    typer.Option(
        metavar="SHARE",
        help="Share of the training set to hold out, from 0 to below 1: each strategy's best evaluation is"
        " then chosen on it. 0: nothing is held out, and the best is chosen on the test set itself.",
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Threads per worker. Default: cores / workers; 1 with --simulate.",
        show_default=False,
    ),
]
Fabric = Annotated[
    str | None,
    typer.Option(metavar="native|torch", help=FABRIC_HELP),
]
JsonFile = Annotated[Path | None, typer.Option("--json", metavar="FILE", help="Write all results as JSON.")]
HtmlFile = Annotated[
    Path | None,
    typer.Option("--html", metavar="FILE", help="Write a web page with a table and diagrams."),
]
Simulate = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Train on N simulated workers in one process and in simulated time, instead of on -n processes."
        " The options below need it.",
        rich_help_panel=SIMULATION,
    ),
]
Compute = Annotated[
    str,
    typer.Option(
        help="Seconds that one worker needs for its share of the batch. `measured`: time the task on this"
        " machine for about two seconds, and print the value of --compute that repeats the result. Or a"
        " distribution: constant, normal, exponential, shifted_exponential, pareto or empirical; for example"
        " 'pareto(shape=3, minimum_s=0.01)'.",
        metavar="DISTRIBUTION",
        rich_help_panel=SIMULATION,
    ),
]
CodecCost = Annotated[
    str,
    typer.Option(
        help="Simulated time of encoding, decoding, server updates and outer steps. `measured`: their"
        " time on one core of this machine, independent of --compute. `none`: zero. FILE: the costs in an"
        " earlier --json FILE.",
        metavar="measured|none|FILE",
        rich_help_panel=SIMULATION,
    ),
]
Network = Annotated[
    str,
    typer.Option(
        help="The network, for example 'cluster(hosts=4, local=2)' for --simulate 8. message_us: fixed cost"
        " of a message at each end, in microseconds.",
        metavar="TOPOLOGY",
        rich_help_panel=SIMULATION,
    ),
]
Faults = Annotated[
    str,
    typer.Option(
        help="Faults, joined by +: kill, pause, slow, join, drop_link, partition, random; for example"
        " 'kill(rank=3, at_s=1.5)'.",
        metavar="FAULTS",
        rich_help_panel=SIMULATION,
    ),
]
Record = Annotated[
    str,
    typer.Option(
        help="Write the order in which parameter_server handled the workers' messages, for --replay: one"
        " file per rank, FILE.0, FILE.1 … Needs exactly one parameter_server among --strategies.",
        metavar="FILE",
    ),
]
Replay = Annotated[
    str,
    typer.Option(
        help="Repeat a run bit for bit: parameter_server handles messages in the order in --record FILE."
        " Needs the same TASK, --seed, --batch-size, strategy and number of workers, which may be"
        " simulated.",
        metavar="FILE",
    ),
]
Trace = Annotated[
    Path | None,
    typer.Option(
        help="Folder for event logs and Perfetto traces.", metavar="FOLDER", rich_help_panel=SIMULATION
    ),
]
Progress = Annotated[bool, typer.Option("--progress/--no-progress", help="Show progress bars.")]
