"""`paceline manifest`: a job as a Kubernetes object."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from paceline.cli.arguments import job as args
from paceline.cli.arguments.job import ENGINE, LAUNCH, TRAIN
from paceline.cli.arguments.plugins import Plugins

Threads = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="Threads per worker (OMP_NUM_THREADS). Default: cpus= of --resources, else 1.",
        show_default=False,
        rich_help_panel=LAUNCH,
    ),
]
MinWorkers = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="With --kind pytorchjob: continue while N workers are left in all pods together; a multiple of"
        " -n (whole pods). Default: every loss is a failure; with --max-workers, -n (one pod).",
        show_default=False,
        rich_help_panel=ENGINE,
    ),
]
MaxWorkers = Annotated[
    int | None,
    typer.Option(
        metavar="N",
        help="With --kind pytorchjob: the most workers, in all pods, that the job takes when there is room: a"
        " multiple of -n. Default: -n × --nodes.",
        show_default=False,
        rich_help_panel=ENGINE,
    ),
]


def manifest(
    script: Annotated[
        str, typer.Argument(help="A file in the image, or the name of a module with -m.", metavar="SCRIPT")
    ],
    arguments: args.Arguments = None,
    image: Annotated[
        str,
        typer.Option(
            metavar="IMAGE",
            help="Container image with paceline and the script. Required.",
            rich_help_panel=ENGINE,
        ),
    ] = "",
    kind: Annotated[
        str,
        typer.Option(
            metavar="trainjob|pytorchjob",
            help="Kubeflow Trainer's TrainJob, or the older training operator's PyTorchJob.",
            rich_help_panel=ENGINE,
        ),
    ] = "trainjob",
    namespace: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Kubernetes namespace of the job. Default: kubectl's current one.",
            rich_help_panel=ENGINE,
        ),
    ] = None,
    runtime: Annotated[
        str,
        typer.Option(
            metavar="NAME", help="ClusterTrainingRuntime that a TrainJob uses.", rich_help_panel=ENGINE
        ),
    ] = "torch-distributed",
    workers: args.Workers = 1,
    module: args.Module = False,
    nodes: args.Nodes = 1,
    threads: Threads = None,
    max_restarts: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help="With --kind pytorchjob: restart workers up to N times after a failure. Default: the"
            " operator's; 3 with --min-workers or --max-workers. For a TrainJob, set it in the runtime.",
            show_default=False,
            rich_help_panel=LAUNCH,
        ),
    ] = None,
    resources: args.ResourcesText = None,
    env: args.Environment = None,
    min_workers: MinWorkers = None,
    max_workers: MaxWorkers = None,
    name: Annotated[
        str, typer.Option(metavar="NAME", help="The job's name in Kubernetes.", rich_help_panel=ENGINE)
    ] = "paceline",
    strategy: args.Strategy = None,
    plugin: Plugins = None,
    fabric: args.Fabric = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="Resume from this checkpoint if it exists, and save to it on SIGTERM: a path on a volume"
            " that all pods see.",
            rich_help_panel=TRAIN,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of YAML.")] = False,
) -> None:
    """Print a Kubeflow training job that runs SCRIPT, as YAML.

    Apply it with `paceline manifest … | kubectl apply -f -`. The job has --nodes pods with -n workers
    each. Nothing is started, and no cluster is contacted.
    """
    from paceline.cli.arguments import values
    from paceline.errors import ConfigError
    from paceline.launchers.job import JobSpec
    from paceline.launchers.manifest import manifest as make
    from paceline.launchers.manifest import to_yaml
    from paceline.options import JobOptions

    if not image:
        raise ConfigError("manifest: --image IMAGE is needed: a container image with paceline and the script")
    values.check_training(strategy, fabric)
    job = JobSpec(
        command=(sys.executable, *(("-m",) if module else ()), script, *(arguments or [])),
        num_workers=workers,
        options=JobOptions(strategy=strategy, fabric=fabric, checkpoint=checkpoint, progress=False),
        nodes=nodes,
        threads=threads,
        max_restarts=max_restarts,
        name=name,
        resources=values.parse_resources(resources),
        environment=values.parse_environment(env),
        min_workers=min_workers,
        max_workers=max_workers,
    )
    made = make(job, image=image, kind=kind, namespace=namespace, runtime=runtime)
    values.check_strategy_values(strategy)
    typer.echo(json.dumps(made, indent=2) + "\n" if as_json else to_yaml(made), nl=False)


def register(app: typer.Typer) -> None:
    """Add `paceline manifest` to the command line."""
    app.command("manifest", context_settings={"allow_interspersed_args": False})(manifest)
