"""Workers as one barrier stage of a Spark job: one task per worker, all at once, on any cluster manager.

A task supervises a worker process and obeys the launcher, which is the Spark driver. When workers are lost,
every task fails, Spark runs the stage again, and the workers resume from the job's last checkpoint.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import Any

from paceline.errors import ConfigError
from paceline.launchers.job import JobSpec
from paceline.launchers.processes import signals
from paceline.launchers.processes.console import Console
from paceline.launchers.processes.outcome import Outcome
from paceline.launchers.remote.driver import check_secret, parse_wait
from paceline.launchers.runner import Runner
from paceline.launchers.spark.driver import WAIT_S, run_stage
from paceline.launchers.spark.session import session


class SparkRunner(Runner):
    """A barrier stage on the active Spark session, or on one that is made for the job.

    Args:
        master: Engine option: spark://HOST:7077, yarn, local[4] …; default: as Spark is configured, else this
            host. Has no effect on an active session.
        wait: Engine option: seconds to wait for free slots; default 120.
        spark.…: Engine options: any setting of Spark, e.g. spark.executor.memory=8g.

    Example:
        paceline run --on spark -n 8 -o master=spark://HOST:7077 -o spark.executor.memory=8g train.py
    """

    extra = "spark"
    packages = ("pyspark", "pandas", "pyarrow")
    options = MappingProxyType(
        {
            "master": "spark://HOST:7077, yarn, local[4] …; default: as Spark is configured",
            "wait": f"seconds to wait for free slots (default {WAIT_S:g})",
            "spark.…": "any setting of Spark",
            "*": "",
        }
    )
    can_ship = True

    @property
    def dumps(self) -> Callable[[Any], bytes]:
        """Functions of scripts and notebooks travel by value."""
        from pyspark import cloudpickle

        dumps: Callable[[Any], bytes] = cloudpickle.dumps
        return dumps

    def check(self, job: JobSpec) -> None:
        """Refuse hosts, gpus and memory, which are the executors', and options that are not Spark's."""
        super().check(job)
        check_secret(job, self.name)
        if job.nodes > 1:
            raise ConfigError(
                f"engine spark: it places tasks where slots are free; give -n {job.total_workers} and leave"
                " out --nodes"
            )
        if job.resources is not None and (job.resources.gpus or job.resources.memory_bytes):
            raise ConfigError(
                "engine spark: of --resources only cpus= applies to a task; memory and gpus belong to"
                " executors: -o spark.executor.memory=…, -o spark.task.resource.gpu.amount=…"
            )
        for name in job.engine_options:
            if name not in ("master", "wait") and not name.startswith("spark."):
                raise ConfigError(f"engine spark: option {name}: master, wait or spark.… expected")
        parse_wait(job, self.name, default=WAIT_S)

    def run(self, job: JobSpec, *, console: Console) -> Outcome:
        """Run `job` in a barrier stage without data, and leave no stage behind."""
        try:
            with session(job, console) as spark:
                return run_stage(job, spark, console)
        except (KeyboardInterrupt, signals.Stopped) as error:  # while Spark was starting
            return Outcome.stopped_by(signals.number_of(error))
