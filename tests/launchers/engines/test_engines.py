"""The seam that all engines share: one JobSpec, one file per engine, refusals before anything starts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest

import paceline
from paceline.cli.arguments.values import parse_environment, parse_resources
from paceline.launchers import runner as runners
from paceline.launchers.engines import ray, spark
from paceline.launchers.job import JobSpec, Resources
from paceline.launchers.processes.console import Console
from paceline.launchers.processes.outcome import Outcome
from paceline.launchers.runner import Runner


class Elsewhere(Runner):
    extra = "elsewhere"
    packages = ("no_such_package",)
    options: ClassVar[Mapping[str, str]] = {"queue": "where to wait"}

    def run(self, job: JobSpec, *, console: Console) -> Outcome:
        raise AssertionError("not meant to run")


class Here(Elsewhere):
    packages = ()


class Ray(ray.RayRunner):
    packages = ()


class Spark(spark.SparkRunner):
    packages = ()


def job(**values: Any) -> JobSpec:
    return JobSpec(**({"command": ("true",), "num_workers": 2} | values))


def test_every_engine_is_found_and_checks_a_plain_job_or_names_its_extra() -> None:
    from paceline import registry

    assert "local" in registry.names(runners.PACKAGE)
    for name in registry.names(runners.PACKAGE):
        engine = runners.make(name)
        assert engine.name == name
        assert not engine.packages or engine.extra, "what is missing must be installable by an extra"


@pytest.mark.parametrize(
    ("engine", "values", "said"),
    [
        (Elsewhere(), {}, r"needs no_such_package: pip install 'paceline\[elsewhere\]'"),
        (Here(), {"engine_options": {"qeue": "a"}}, "Did you mean 'queue'"),
        (Here(), {"min_workers": 1}, "exactly the workers"),
        (Here(), {"ship": Path()}, "sends no code"),
        (Here(), {"rendezvous": "a:1"}, "leave out --rendezvous"),
        (runners.make("local"), {"nodes": 2}, "needs --rendezvous"),
        (Spark(), {"nodes": 2}, "give -n 4 and leave out --nodes"),
        (Spark(), {"resources": Resources(gpus=1)}, "spark.task.resource.gpu.amount"),
        (Spark(), {"engine_options": {"mster": "a"}}, "master, wait or spark"),
        (Ray(), {"engine_options": {"wait": "long"}}, "wait=long: seconds from 0 up expected"),
        (Ray(), {"rendezvous": "a:1"}, "leave out --rendezvous"),
        (runners.make("local"), {"engine_options": {"a": "b"}}, "no options of its own"),
        (runners.make("local"), {"resources": Resources(gpus=1)}, "reserves neither gpus nor memory"),
    ],
)
def test_an_engine_refuses_what_it_cannot_do(engine: Runner, values: dict[str, Any], said: str) -> None:
    with pytest.raises(paceline.ConfigError, match=said):
        engine.check(job(**values))


@pytest.mark.parametrize(
    "values",
    [
        {"min_workers": 3},
        {"max_workers": 1},
        {"min_workers": 0},
        {"working_directory": Path("/no/such/folder")},
        {"environment": {"A=B": "c"}},
        {"max_restarts": -1},
    ],
)
def test_a_job_that_can_run_nowhere_is_refused(values: dict[str, Any]) -> None:
    with pytest.raises(paceline.ConfigError):
        job(**values)


def test_unknown_engine_names_the_known_ones() -> None:
    with pytest.raises(paceline.ConfigError, match=r"unknown engine 'locl'. Did you mean 'local'\?"):
        paceline.launch(print, num_workers=1, on="locl")


def test_resources_and_environment_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    assert parse_resources("cpus=1.5,memory=2g") == Resources(cpus=1.5, memory_bytes=2 << 30)
    monkeypatch.setenv("COLOUR", "red")
    assert parse_environment(["COLOUR", "SIZE=a=b"]) == {"COLOUR": "red", "SIZE": "a=b"}
    for bad in ("cpu=1", "cpus=x", "memory=4q", "gpus"):
        with pytest.raises(paceline.ConfigError, match="--resources"):
            parse_resources(bad)
    with pytest.raises(paceline.ConfigError, match="not set here"):
        parse_environment(["NO_SUCH_VARIABLE_HERE"])


def test_workers_run_where_they_are_told(tmp_path: Path) -> None:
    found = paceline.launch(_where, num_workers=1, working_directory=tmp_path, environment={"A": "b"})
    assert found == [(str(tmp_path), "b")]


def _where() -> tuple[str, str]:
    import os

    return os.getcwd(), os.environ["A"]
