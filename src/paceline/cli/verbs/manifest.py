"""`paceline manifest`: a job as a Kubernetes object."""

from __future__ import annotations

import json
import sys
from typing import Annotated

import typer

from paceline.cli.arguments import job as args
from paceline.cli.arguments.job import ENGINE, TRAIN


def manifest(
    script: Annotated[
        str, typer.Argument(help="A file in the image, or a module's name with -m.", metavar="SCRIPT")
    ],
    arguments: args.Arguments = None,
    image: Annotated[
        str, typer.Option(help="The container image, with paceline and the script.", rich_help_panel=ENGINE)
    ] = "",
    kind: Annotated[
        str,
        typer.Option(
            metavar="trainjob|pytorchjob",
            help="Kubeflow Trainer's object, or that of the older training operator.",
            rich_help_panel=ENGINE,
        ),
    ] = "trainjob",
    namespace: Annotated[str | None, typer.Option(rich_help_panel=ENGINE)] = None,
    runtime: Annotated[
        str, typer.Option(help="The ClusterTrainingRuntime of a TrainJob.", rich_help_panel=ENGINE)
    ] = "torch-distributed",
    workers: args.Workers = 1,
    module: args.Module = False,
    nodes: args.Nodes = 1,
    threads: args.Threads = None,
    max_restarts: args.MaxRestarts = None,
    resources: args.ResourcesText = None,
    env: args.Environment = None,
    min_workers: args.MinWorkers = None,
    max_workers: args.MaxWorkers = None,
    name: args.Name = "paceline",
    strategy: Annotated[
        str | None,
        typer.Option(metavar="SPEC", help="How to train; see `paceline strategies`.", rich_help_panel=TRAIN),
    ] = None,
    fabric: Annotated[
        str | None,
        typer.Option(metavar="native|torch", help="What carries tensors.", rich_help_panel=TRAIN),
    ] = None,
    checkpoint: Annotated[
        str | None,
        typer.Option(
            metavar="PATH",
            help="Resume from here, save here on SIGTERM: on a volume that all pods see.",
            rich_help_panel=TRAIN,
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of YAML.")] = False,
) -> None:
    """Print a Kubeflow training job that runs SCRIPT: `paceline manifest … | kubectl apply -f -`.

    Nothing is started and no cluster is asked. --nodes pods with -n workers each.
    """
    from paceline.errors import ConfigError
    from paceline.launchers.job import JobSpec
    from paceline.launchers.manifest import manifest as make
    from paceline.launchers.manifest import to_yaml
    from paceline.options import JobOptions

    if not image:
        raise ConfigError("manifest: --image NAME is needed: a container image with paceline and the script")
    args.check_training(strategy, fabric)
    job = JobSpec(
        command=(sys.executable, *(("-m",) if module else ()), script, *(arguments or [])),
        num_workers=workers,
        options=JobOptions(strategy=strategy, fabric=fabric, checkpoint=checkpoint, progress=False),
        nodes=nodes,
        threads=threads,
        max_restarts=max_restarts,
        name=name,
        resources=args.parse_resources(resources),
        environment=args.parse_environment(env),
        min_workers=min_workers,
        max_workers=max_workers,
    )
    made = make(job, image=image, kind=kind, namespace=namespace, runtime=runtime)
    typer.echo(json.dumps(made, indent=2) + "\n" if as_json else to_yaml(made), nl=False)


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("manifest", context_settings={"allow_interspersed_args": False})(manifest)
