"""A job as a Kubernetes object: Kubeflow Trainer's TrainJob, or the older training operator's PyTorchJob.

Both start `torchrun` in every pod with its options in the environment (PET_…); `paceline.init()` reads its
rank from torchrun's variables. Sources: trainer.kubeflow.org/v1alpha1 TrainJob; kubeflow.org/v1 PyTorchJob.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
from collections.abc import Iterator
from typing import Any

from paceline.errors import ConfigError
from paceline.launchers.job import JobSpec
from paceline.options import new_secret

KINDS = ("trainjob", "pytorchjob")
Json = dict[str, Any] | list[Any]
_SHM = "shared-memory"
_NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")


def manifest(
    job: JobSpec,
    *,
    image: str,
    kind: str = "trainjob",
    namespace: str | None = None,
    runtime: str = "torch-distributed",
) -> dict[str, Any]:
    """The object for `kubectl apply`.

    Args:
        job: What to run. Its command's script must be in the image.
        image: Container image with paceline and the script.
        kind: "trainjob" or "pytorchjob".
        namespace: The object's namespace; None: kubectl's current one.
        runtime: Name of the ClusterTrainingRuntime of a TrainJob.

    Raises:
        ConfigError: The kind is unknown or cannot express the job.
    """
    if kind not in KINDS:
        raise ConfigError(f"manifest: kind {' or '.join(KINDS)} expected, got {kind!r}")
    if len(job.name) > 63 or not _NAME.fullmatch(job.name):
        raise ConfigError(
            f"--name {job.name!r}: Kubernetes allows at most 63 of a-z, 0-9 and '-', beginning with a letter"
        )
    for what, given in (
        ("--rendezvous", job.rendezvous),
        ("--secret-file", job.secret_file),
        ("--ship", job.ship),
    ):
        if given is not None:
            raise ConfigError(f"manifest: {what} has no meaning in a cluster; leave it out")
    if kind == "trainjob" and job.is_elastic:
        raise ConfigError("manifest: a TrainJob has a fixed number of nodes; --kind pytorchjob is elastic")
    if kind == "trainjob" and job.max_restarts:
        raise ConfigError("manifest: a TrainJob's restarts are set in its runtime; leave out --max-restarts")
    metadata = {"name": job.name} | ({"namespace": namespace} if namespace else {})
    if kind == "trainjob":
        return {
            "apiVersion": "trainer.kubeflow.org/v1alpha1",
            "kind": "TrainJob",
            "metadata": metadata,
            "spec": {"runtimeRef": {"name": runtime}, "trainer": _trainer(job, image)},
        }
    return {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": metadata,
        "spec": _pytorch_spec(job, image),
    }


def to_yaml(value: Json, indent: str = "") -> str:
    """Plain values in YAML's block style, with strings quoted as in JSON."""
    return "".join(f"{line}\n" for line in _lines(value, indent))


def _lines(value: Json, indent: str) -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            if isinstance(item, (dict, list)) and item:
                yield f"{indent}{key}:"
                yield from _lines(item, indent + "  ")
            else:
                yield f"{indent}{key}: {json.dumps(item)}"
        return
    for item in value:
        if isinstance(item, dict):
            first, *others = _lines(item, indent + "  ")
            yield f"{indent}- {first.strip()}"
            yield from others
        else:
            yield f"{indent}- {json.dumps(item)}"


def _trainer(job: JobSpec, image: str) -> dict[str, Any]:
    trainer: dict[str, Any] = {
        "image": image,
        "command": _command(job),
        "env": _env(job),
        "numNodes": job.nodes,
        "numProcPerNode": job.num_workers,
    }
    return trainer | ({"resourcesPerNode": r} if (r := _resources(job)) else {})


def _pytorch_spec(job: JobSpec, image: str) -> dict[str, Any]:
    container: dict[str, Any] = {
        "name": "pytorch",
        "image": image,
        "command": _command(job),
        "env": _env(job),
        "volumeMounts": [{"name": _SHM, "mountPath": "/dev/shm"}],
    }
    if resources := _resources(job):
        container["resources"] = resources
    if job.working_directory is not None:
        container["workingDir"] = str(job.working_directory)
    pod = {
        "containers": [container],
        # The default of 64 MiB is too little for DataLoader workers.
        "volumes": [{"name": _SHM, "emptyDir": {"medium": "Memory"}}],
        "terminationGracePeriodSeconds": math.ceil(job.stop_grace_s),
    }

    def replicas(count: int) -> dict[str, Any]:
        return {"replicas": count, "restartPolicy": "OnFailure", "template": {"spec": pod}}

    spec: dict[str, Any] = {"nprocPerNode": str(job.num_workers)}
    if job.max_restarts is not None:
        spec["runPolicy"] = {"backoffLimit": job.max_restarts}
    if job.is_elastic:
        spec["elasticPolicy"] = {
            "rdzvBackend": "c10d",
            "minReplicas": _hosts(job, job.min_workers or job.num_workers, "--min-workers"),
            "maxReplicas": _hosts(job, job.max_workers or job.total_workers, "--max-workers"),
            "maxRestarts": 3 if job.max_restarts is None else job.max_restarts,
        }
        return spec | {"pytorchReplicaSpecs": {"Worker": replicas(job.nodes)}}
    workers = {"Worker": replicas(job.nodes - 1)} if job.nodes > 1 else {}
    return spec | {"pytorchReplicaSpecs": {"Master": replicas(1), **workers}}


def _hosts(job: JobSpec, workers: int, option: str) -> int:
    if workers % job.num_workers:
        raise ConfigError(
            f"manifest: {option} {workers}: pods start and end as a whole; a multiple of -n {job.num_workers}"
            " expected"
        )
    return workers // job.num_workers


def _command(job: JobSpec) -> list[str]:
    """torchrun with the job's script, without the Python of this host: the image has its own."""
    words = list(job.command)
    if words and words[0] == sys.executable:
        words = words[1:]
    return ["torchrun", *(w for w in words if w != "-u")]


def _env(job: JobSpec) -> list[dict[str, str]]:
    options = dataclasses.replace(job.options, secret=new_secret(), bar_columns=0)
    variables = {
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": str(job.remote_worker_threads),
        **options.to_environment(),
        **job.environment,
    }
    return [{"name": name, "value": value} for name, value in sorted(variables.items())]


def _resources(job: JobSpec) -> dict[str, Any]:
    """Requests and limits of a pod: the sum of what its workers need."""
    if job.resources is None:
        return {}
    wanted: dict[str, str] = {"cpu": f"{math.ceil(job.resources.cpus * job.num_workers * 1000)}m"}
    if job.resources.memory_bytes is not None:
        wanted["memory"] = f"{math.ceil(job.resources.memory_bytes * job.num_workers / 2**20)}Mi"
    gpus = math.ceil(job.resources.gpus * job.num_workers)
    limits = {k: v for k, v in wanted.items() if k != "cpu"} | ({"nvidia.com/gpu": str(gpus)} if gpus else {})
    return {"requests": wanted | ({"nvidia.com/gpu": str(gpus)} if gpus else {})} | (
        {"limits": limits} if limits else {}
    )
