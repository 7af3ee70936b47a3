"""The Spark session of a job: the active one, or one that is started for it; and Spark's errors explained."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from typing import IO, TYPE_CHECKING

from paceline.errors import ConfigError
from paceline.launchers.job import JobSpec
from paceline.launchers.processes.console import Console
from paceline.launchers.processes.failure import error_line
from paceline.launchers.remote.driver import DEFAULT_RESTARTS
from paceline.user_input import digits

if TYPE_CHECKING:
    from pyspark import SparkConf, SparkContext
    from pyspark.sql import SparkSession

_QUIET = {"spark.ui.enabled": "false", "spark.ui.showConsoleProgress": "false", "spark.log.level": "OFF"}
_STANDALONE = "spark://"
_PROBE_S = 10.0
_TRACEBACK = "Traceback (most recent call last):"


@contextlib.contextmanager
def session(job: JobSpec, console: Console) -> Iterator[SparkSession]:
    """The active Spark session, or a new one that ends with the job."""
    from pyspark import SparkContext
    from pyspark.sql import SparkSession

    active = SparkSession.getActiveSession()
    # Spark has no public name for "is there a context?" that does not start one.
    if active is not None or SparkContext._active_spark_context is not None:  # noqa: SLF001
        yield active or SparkSession.builder.getOrCreate()
        return
    spark = _start(job, console)
    try:
        yield spark
    finally:
        spark.stop()


def use_own_python(context: SparkContext) -> None:
    """Let executors use this process's Python, unless Spark's settings name another.

    spark-submit would set this; without it, executors would take the first Python on their PATH.
    """
    if "PYSPARK_PYTHON" not in os.environ:
        context.pythonExec = context.getConf().get("spark.pyspark.python") or sys.executable


def _start(job: JobSpec, console: Console) -> SparkSession:
    """A new session, or ConfigError with Spark's reason."""
    from py4j.protocol import Py4JError
    from pyspark import SparkConf
    from pyspark.errors import PySparkException
    from pyspark.sql import SparkSession

    with tempfile.TemporaryFile() as java_output:
        try:
            conf = SparkConf().setAll(list(_settings(job).items())).setAppName(job.name)
            if master := job.engine_options.get("master"):
                conf.setMaster(master)
            is_here = not conf.contains("spark.master")
            if is_here:
                conf.setMaster(f"local[{job.total_workers}]")
            _probe(str(conf.get("spark.master")))
            _start_java(conf, java_output)
            spark = SparkSession.builder.config(conf=conf).getOrCreate()
        except (PySparkException, Py4JError, RuntimeError, OSError) as error:
            reason = _java_error(java_output) or explain(error)
            if "stopped SparkContext" in reason:
                reason = f"{conf.get('spark.master')} did not accept the application; is it a Spark master?"
            raise ConfigError(f"engine spark: Spark did not start: {reason}") from None
    if is_here:
        console.note("no Spark cluster is configured: started Spark on this host, for this job only")
    return spark


def _settings(job: JobSpec) -> dict[str, str]:
    settings = dict(_QUIET)
    if job.resources is not None:
        settings["spark.task.cpus"] = str(max(1, round(job.resources.cpus)))
    restarts = DEFAULT_RESTARTS if job.max_restarts is None else job.max_restarts
    settings["spark.stage.maxConsecutiveAttempts"] = str(restarts + 1)
    return settings | {n: v for n, v in job.engine_options.items() if n.startswith("spark.")}


def _probe(master: str) -> None:
    """Raise ConfigError at once if no master answers, where Spark itself would try for a minute."""
    if not master.startswith(_STANDALONE):
        return
    reasons = []
    for place in master.removeprefix(_STANDALONE).split(","):
        host, _, port = place.rpartition(":")
        if not host or digits(port) is None:
            raise ConfigError(f"engine spark: option master={master}: spark://HOST:PORT expected")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_PROBE_S).close()
            return
        except (OSError, OverflowError) as error:
            reasons.append(str(error))
    raise ConfigError(f"engine spark: no Spark master answers at {master}: {'; '.join(reasons)}")


def _start_java(conf: SparkConf, output: IO[bytes]) -> None:
    """Start the driver's Java as Spark would, with its log in `output`, unless the user set a log level."""
    from pyspark import SparkContext
    from pyspark.java_gateway import launch_gateway

    # Spark has no public way to start its Java with another standard error.
    if SparkContext._gateway is None and conf.get("spark.log.level") == _QUIET["spark.log.level"]:  # noqa: SLF001
        gateway = launch_gateway(conf, {"stderr": output})
        SparkContext._ensure_initialized(gateway=gateway, conf=conf)  # noqa: SLF001


def _java_error(output: IO[bytes]) -> str:
    """The exception with which Java ended, or "" if it did not."""
    output.seek(0)
    for line in output.read().decode(errors="replace").splitlines():
        if line.startswith(("Exception in thread", "Error: ")):
            return line.rpartition("Exception: ")[2].strip()[:500]
        if "JAVA_HOME is not set" in line or "java: No such file" in line:
            return f"it needs Java: {line.rpartition('spark-class: ')[2].strip()[:500]}"
    return ""


def explain(error: BaseException | None) -> str:
    """The first line of Spark's error, without Java's stack; of a Python task's error, the exception."""
    if error is None:
        return "without an error"
    java = getattr(error, "java_exception", None)
    text = str(java.getMessage() if java is not None else error) or type(error).__name__
    lines = text.splitlines()
    python = [i for i, line in enumerate(lines) if _TRACEBACK in line]
    if python:  # the error of a task explains more than that of its stage
        cause = error_line([_TRACEBACK, *lines[python[-1] + 1 :]])
        hint = "is Paceline installed for the executors' Python? See PYSPARK_PYTHON"
        return f"a task failed: {cause}" + (f" ({hint})" if "'paceline'" in cause else "")
    return next((line.strip()[:500] for line in lines if line.strip()), type(error).__name__)
