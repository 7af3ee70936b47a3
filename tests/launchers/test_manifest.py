"""`paceline manifest` against the schemas of the objects that it prints."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from paceline.errors import ConfigError
from paceline.launchers.job import JobSpec, Resources
from paceline.launchers.manifest import manifest, to_yaml
from paceline.options import VARIABLE, JobOptions

SCHEMAS = {
    k: json.loads((Path(__file__).parent / "schemas" / f"{k}.json").read_text())
    for k in ("trainjob", "pytorchjob")
}


def spec(**changes: Any) -> JobSpec:
    base = {"command": (sys.executable, "-u", "/app/train.py", "--name", "it's: a #test"), "num_workers": 4}
    return JobSpec(**{**base, **changes})


def command_line(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "paceline.cli.main", "manifest", *words],
        check=False, capture_output=True, text=True, timeout=60,
    )  # fmt: skip


@pytest.mark.parametrize("kind", SCHEMAS)
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"nodes": 3},
        {"nodes": 2, "resources": Resources(cpus=1.5, gpus=1, memory_bytes=3 << 29)},
        {"environment": {"A": "1", "B": "x: y\n- z"}, "options": JobOptions(strategy="local_sgd(period=8)")},
    ],
)
def test_every_object_fits_its_schema(kind: str, changes: dict[str, Any]) -> None:
    job = spec(**changes)
    made = manifest(job, image="registry/app:1", kind=kind, namespace="team")
    jsonschema.validate(made, SCHEMAS[kind])
    assert yaml.safe_load(to_yaml(made)) == made  # what a cluster reads is what was meant
    trainer = (
        made["spec"].get("trainer")
        or made["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]["containers"][0]
    )
    assert trainer["command"] == ["torchrun", "/app/train.py", "--name", "it's: a #test"]
    env = {e["name"]: e["value"] for e in trainer["env"]}
    found = JobOptions.from_environment({VARIABLE: env[VARIABLE]})
    assert len(found.secret) == 64, "pods do not share a home folder: the job's key comes with the manifest"
    assert dataclasses.replace(found, secret="") == job.options
    assert job.environment.items() <= env.items()


def test_counts_and_resources() -> None:
    job = spec(nodes=3, resources=Resources(cpus=2, gpus=1, memory_bytes=1 << 30))
    trainer = manifest(job, image="i")["spec"]["trainer"]
    assert (trainer["numNodes"], trainer["numProcPerNode"]) == (3, 4)
    assert trainer["resourcesPerNode"] == {
        "requests": {"cpu": "8000m", "memory": "4096Mi", "nvidia.com/gpu": "4"},
        "limits": {"memory": "4096Mi", "nvidia.com/gpu": "4"},
    }
    older = manifest(job, image="i", kind="pytorchjob")["spec"]
    assert older["nprocPerNode"] == "4"
    assert {k: v["replicas"] for k, v in older["pytorchReplicaSpecs"].items()} == {"Master": 1, "Worker": 2}


def test_elastic_bounds_count_pods() -> None:
    made = manifest(
        spec(nodes=2, min_workers=4, max_workers=16, max_restarts=5), image="i", kind="pytorchjob"
    )
    jsonschema.validate(made, SCHEMAS["pytorchjob"])
    policy = made["spec"]["elasticPolicy"]
    assert (policy["minReplicas"], policy["maxReplicas"], policy["maxRestarts"]) == (1, 4, 5)
    assert list(made["spec"]["pytorchReplicaSpecs"]) == ["Worker"]


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"name": "Not_A_Name"}, {}, "--name 'Not_A_Name'"),
        ({}, {"kind": "job"}, "trainjob or pytorchjob"),
        ({"min_workers": 2}, {}, "--kind pytorchjob is elastic"),
        ({"nodes": 2, "min_workers": 3}, {"kind": "pytorchjob"}, "a multiple of -n 4"),
        ({"rendezvous": "a:1"}, {}, "--rendezvous has no meaning"),
        ({"max_restarts": 2}, {}, "leave out --max-restarts"),
    ],
)
def test_what_cannot_be_said(changes: dict[str, Any], options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        manifest(spec(**changes), image="i", **options)


def test_the_command() -> None:
    done = command_line(
        "--image", "app:1", "-n", "2", "--nodes", "2", "--strategy", "diloco", "/app/t.py", "--lr", "1"
    )
    made = yaml.safe_load(done.stdout)
    jsonschema.validate(made, SCHEMAS["trainjob"])
    assert made["spec"]["trainer"]["command"] == ["torchrun", "/app/t.py", "--lr", "1"]
    as_json = command_line("--json", "--kind", "pytorchjob", "--image", "app:1", "-m", "app.train")
    jsonschema.validate(json.loads(as_json.stdout), SCHEMAS["pytorchjob"])
    assert command_line("t.py").returncode == 2
    wrong = command_line("--image", "i", "--strategy", "dilloco", "t.py")
    assert wrong.returncode == 2 and "Did you mean 'diloco'" in wrong.stderr
