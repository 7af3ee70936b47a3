"""Options that describe a job, declared once for all commands that start or describe one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from paceline import registry

LAUNCH = "Launch"
ENGINE = "Engine"
TRAIN = "Training"
COMPATIBILITY = "Scripts of other projects"

_ENGINES = ", ".join(registry.names("paceline.launchers.engines"))
_LOG_FORMATS = ", ".join(registry.names("paceline.train.logs.formats"))

FABRIC_HELP = (
    "Communication: native (shared memory and TCP) or torch (torch.distributed). Default: native; torch for"
    " models on a GPU."
)
THREADS_HELP = (
    "Threads per worker (OMP_NUM_THREADS). Default: cpus= of --resources; else, on this host, OMP_NUM_THREADS"
    " if set, or cores / workers; elsewhere 1."
)

Script = Annotated[
    str, typer.Argument(help="A Python file, or the name of a module with -m.", metavar="SCRIPT")
]
Arguments = Annotated[
    list[str] | None, typer.Argument(help="Arguments of the script, passed unchanged.", metavar="ARGS")
]

# Launch
Workers = Annotated[
    int,
    typer.Option(
        "-n",
        "-np",
        "--workers",
        metavar="N",
        help="Number of worker processes; with --nodes, on each host.",
        rich_help_panel=LAUNCH,
    ),
]
Engine = Annotated[
    str,
    typer.Option(
        "--on",
        metavar="ENGINE",
        help=f"Where the workers run: {_ENGINES}.",
        rich_help_panel=LAUNCH,
    ),
]
Module = Annotated[
    bool, typer.Option("-m", "--module", help="SCRIPT is the name of a module.", rich_help_panel=LAUNCH)
]
Nodes = Annotated[int, typer.Option(metavar="N", help="Number of hosts.", rich_help_panel=LAUNCH)]
Rendezvous = Annotated[
    str | None,
    typer.Option(
        metavar="HOST:PORT",
        help="Required for --on local with --nodes 2 or more: address and port of one host, where the"
        " launchers meet. Other engines refuse it.",
        rich_help_panel=LAUNCH,
    ),
]
SecretFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="A file with the job's key, the same on every host. Default: on one host, a key made for the"
        " job; on several, the file that PACELINE_SECRET_FILE names, else ~/.config/paceline/key.",
        rich_help_panel=LAUNCH,
    ),
]
Threads = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help=THREADS_HELP,
        show_default=False,
        rich_help_panel=LAUNCH,
    ),
]
MaxRestarts = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="After a failure, restart all workers, up to N times; they continue from --checkpoint or,"
        " without it, start over. Default: 0; on ray and spark 3 if a worker was killed. mpi"
        " refuses it.",
        show_default=False,
        rich_help_panel=LAUNCH,
    ),
]
Grace = Annotated[
    float | None,
    typer.Option(
        metavar="SECONDS",
        help="Time from SIGTERM to SIGKILL when the job is stopped. Default: 30 with --checkpoint, else 5.",
        show_default=False,
        rich_help_panel=LAUNCH,
    ),
]

# Engine
ResourcesText = Annotated[
    str | None,
    typer.Option(
        "--resources",
        metavar="NEEDS",
        help="What each worker needs: cpus=, gpus= and memory=, for example cpus=2,gpus=1,memory=4g (k, m, g,"
        " t: powers of 1024).",
        rich_help_panel=ENGINE,
    ),
]
Environment = Annotated[
    list[str] | None,
    typer.Option(
        "--env",
        metavar="NAME=VALUE",
        help="Environment variable for every worker; NAME alone copies this shell's value. Repeatable.",
        rich_help_panel=ENGINE,
    ),
]
WorkingDirectory = Annotated[
    Path | None,
    typer.Option(
        "--workdir",
        metavar="FOLDER",
        help="Where the workers run: the same path on every host. Default: the current directory.",
        rich_help_panel=ENGINE,
    ),
]
Ship = Annotated[
    Path | None,
    typer.Option(
        metavar="FOLDER",
        help="Code folder that ray and spark copy to their hosts. SCRIPT is relative to it; workers run in"
        " the copy.",
        rich_help_panel=ENGINE,
    ),
]
MinWorkers = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="With local and ray: continue after losing workers while N are left on all hosts together."
        " local: the others go on, if rank 0 is alive and the strategy tolerates losses (parameter_server,"
        " gossip, decentralized_threshold). ray: all restart, as many as fit. Below N, the job fails (see"
        " --max-restarts). Default: every loss is a failure.",
        rich_help_panel=ENGINE,
        show_default=False,
    ),
]
MaxWorkers = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="On ray: start up to N workers, over all hosts, if there is room for more than -n × --nodes."
        " Default: exactly -n × --nodes, or fewer with --min-workers.",
        rich_help_panel=ENGINE,
        show_default=False,
    ),
]
Name = Annotated[
    str, typer.Option(metavar="NAME", help="The job's name on the engine.", rich_help_panel=ENGINE)
]
EngineOptions = Annotated[
    list[str] | None,
    typer.Option(
        "-o",
        "--engine-option",
        metavar="NAME=VALUE",
        help="Option of one engine, for example address=HOST:PORT (ray), master=URL (spark), partition=NAME"
        " (slurm) or hosts=a:4,b:4 (mpi). Repeatable.",
        rich_help_panel=ENGINE,
    ),
]
DryRun = Annotated[
    bool,
    typer.Option(
        "--dry-run", help="Print what the engine would be asked to do, and exit.", rich_help_panel=ENGINE
    ),
]

# Training
Strategy = Annotated[
    str | None,
    typer.Option(
        metavar="SPEC",
        help="Training method, for example 'local_sgd(period=16)', instead of the script's."
        " `paceline strategies` lists them.",
        rich_help_panel=TRAIN,
    ),
]
Fabric = Annotated[str | None, typer.Option(metavar="native|torch", help=FABRIC_HELP, rich_help_panel=TRAIN)]
Interface = Annotated[
    str,
    typer.Option(
        metavar="LIST",
        help="This host's network interfaces or addresses for tensors: eth0,eth1 (names, or how they begin),"
        " =eth0 (exactly), ^docker,virbr (all but those). Default: the route to the other hosts.",
        rich_help_panel=TRAIN,
    ),
]
Checkpoint = Annotated[
    str | None,
    typer.Option(
        metavar="PATH",
        help="Resume from this checkpoint if it exists, and save to it on SIGTERM. On several hosts: a folder"
        " that all of them see.",
        rich_help_panel=TRAIN,
    ),
]
LogFolder = Annotated[
    str | None,
    typer.Option(
        "--log-dir",
        metavar="FOLDER",
        help="Where the script's job.log() writes. Default: runs/<date>-<time>.",
        rich_help_panel=TRAIN,
    ),
]
LogFormats = Annotated[
    str | None,
    typer.Option(
        "--log-to",
        metavar="FORMATS",
        help=f"Formats of the log, separated by commas: {_LOG_FORMATS}. Default: the script's, else"
        " jsonl,csv.",
        rich_help_panel=TRAIN,
    ),
]
Progress = Annotated[
    bool, typer.Option("--progress/--no-progress", help="Show progress bars.", rich_help_panel=TRAIN)
]

# Scripts of other projects
AsHorovod = Annotated[
    bool,
    typer.Option(
        "--as-horovod",
        help="`import horovod.torch` in SCRIPT imports paceline.compat.horovod instead.",
        rich_help_panel=COMPATIBILITY,
    ),
]
AsApex = Annotated[
    bool,
    typer.Option(
        "--as-apex",
        help="`import apex` in SCRIPT imports paceline.compat.apex instead.",
        rich_help_panel=COMPATIBILITY,
    ),
]
HorovodHosts = Annotated[
    str | None,
    typer.Option(
        "-H",
        "--hosts",
        metavar="HOST:SLOTS",
        help="As in horovodrun, but for this host only. For several hosts use --nodes.",
        rich_help_panel=COMPATIBILITY,
    ),
]
Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose",
        help="Accepted as in horovodrun; no effect: all output is shown.",
        rich_help_panel=COMPATIBILITY,
    ),
]
