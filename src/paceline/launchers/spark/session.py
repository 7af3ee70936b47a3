"""The Spark session of a job: the active one, or one that is started for it; and what Spark's errors mean."""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import tempfile
from collections.abc import Iterator
from typing import IO, Any

from paceline.errors import ConfigError
from paceline.launchers.job import JobSpec
from paceline.launchers.processes.console import Console
from paceline.launchers.processes.failure import error_line
from paceline.launchers.remote import driver

_QUIET = {"spark.ui.enabled": "false", "spark.ui.showConsoleProgress": "false", "spark.log.level": "OFF"}
_STANDALONE = "spark://"
_PROBE_S = 10.0
_TRACEBACK = "Traceback (most recent call last):"


@contextlib.contextmanager
def session(job: JobSpec, console: Console) -> Iterator[Any]:
    """The active Spark session, or a new one that ends with the job."""
    from pyspark import SparkContext
    from pyspark.sql import SparkSession

    active = SparkSession.getActiveSession()
    if active is not None or SparkContext._active_spark_context is not None:
        yield active or SparkSession.builder.getOrCreate()
        return
    spark = _start(job, console)
    try:
        yield spark
    finally:
        spark.stop()


def use_own_python(context: Any) -> None:
    """Unless Spark was told which Python executors have, it is this process's, not the first on PATH.

    A driver that is plain Python would leave the setting to spark-submit, which is not there.
    """
    if "PYSPARK_PYTHON" not in os.environ:
        context.pythonExec = context.getConf().get("spark.pyspark.python") or sys.executable


def _start(job: JobSpec, console: Console) -> Any:
    """A new session, or ConfigError with Spark's reason."""
    from py4j.protocol import Py4JError
    from pyspark import SparkConf
    from pyspark.errors import PySparkException
    from pyspark.sql import SparkSession

    with tempfile.TemporaryFile() as said:
        try:
            conf = SparkConf().setAll(list(_settings(job).items())).setAppName(job.name)
            if master := job.engine_options.get("master"):
                conf.setMaster(master)
            is_here = not conf.contains("spark.master")
            if is_here:
                conf.setMaster(f"local[{job.total_workers}]")
            _probe(str(conf.get("spark.master")))
            _start_java(conf, said)
            spark = SparkSession.builder.config(conf=conf).getOrCreate()
        except (PySparkException, Py4JError, RuntimeError, OSError) as error:
            reason = _last_words(said) or explain(error)
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
    restarts = driver.LOSSES if job.max_restarts is None else job.max_restarts
    settings["spark.stage.maxConsecutiveAttempts"] = str(restarts + 1)
    return settings | {n: v for n, v in job.engine_options.items() if n.startswith("spark.")}


def _probe(master: str) -> None:
    """Raise ConfigError at once where Spark would try for a minute; one of several masters is enough."""
    if not master.startswith(_STANDALONE):
        return
    reasons = []
    for place in master.removeprefix(_STANDALONE).split(","):
        host, _, port = place.rpartition(":")
        if not host or not port.isdigit():
            raise ConfigError(f"engine spark: option master={master}: spark://HOST:PORT expected")
        try:
            socket.create_connection((host.strip("[]"), int(port)), timeout=_PROBE_S).close()
            return
        except (OSError, OverflowError) as error:
            reasons.append(str(error))
    raise ConfigError(f"engine spark: no Spark master answers at {master}: {'; '.join(reasons)}")


def _start_java(conf: Any, said: IO[bytes]) -> None:
    """Start the driver's Java as Spark would, but keep its chatter, unless somebody wants to see it."""
    from pyspark import SparkContext
    from pyspark.java_gateway import launch_gateway

    if SparkContext._gateway is None and conf.get("spark.log.level") == _QUIET["spark.log.level"]:
        SparkContext._ensure_initialized(gateway=launch_gateway(conf, {"stderr": said}), conf=conf)


def _last_words(said: IO[bytes]) -> str:
    """The exception by which Java ended, if it did."""
    said.seek(0)
    for line in said.read().decode(errors="replace").splitlines():
        if line.startswith(("Exception in thread", "Error: ")):
            return line.rpartition("Exception: ")[2].strip()[:500]
        if "JAVA_HOME is not set" in line or "java: No such file" in line:
            return f"it needs Java: {line.rpartition('spark-class: ')[2].strip()[:500]}"
    return ""


def explain(error: BaseException | None) -> str:
    """The first line of what Spark says, without Java's stack."""
    if error is None:
        return "without an error"
    java = getattr(error, "java_exception", None)
    text = str(java.getMessage() if java is not None else error) or type(error).__name__
    lines = text.splitlines()
    python = [i for i, line in enumerate(lines) if _TRACEBACK in line]
    if python:  # what a task raised says more than the stage's failure
        cause = error_line([_TRACEBACK, *lines[python[-1] + 1 :]])
        where = "is Paceline installed for the executors' Python, see PYSPARK_PYTHON?"
        return f"a task failed: {cause}" + (f" ({where})" if "'paceline'" in cause else "")
    return next((line.strip()[:500] for line in lines if line.strip()), type(error).__name__)
