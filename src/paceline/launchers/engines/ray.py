"""Workers on a Ray cluster: a placement group, and one actor per worker that supervises its process.

Ray restarts an actor that died; Paceline then restarts all workers, which resume from the job's last
checkpoint. Without a running cluster one is started on this host and ended with the job.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MappingProxyType
from typing import Any

from paceline.launchers.job import JobSpec
from paceline.launchers.processes import signals
from paceline.launchers.processes.console import Console
from paceline.launchers.processes.outcome import Outcome
from paceline.launchers.ray.cluster import connected
from paceline.launchers.ray.driver import RayDriver
from paceline.launchers.remote.attempts import run_job
from paceline.launchers.remote.driver import check_secret, parse_wait
from paceline.launchers.runner import Runner

_WAIT_S = 60.0


class RayRunner(Runner):
    """Actors of a running Ray cluster, or of one that is started for the job.

    Args:
        address: Engine option: the cluster: HOST:PORT, ray://HOST:PORT, auto (RAY_ADDRESS, a cluster on this
            host, else a new one), or local for a new one; default auto.
        wait: Engine option: seconds to wait for room in the cluster; default 60.

    Example:
        paceline run --on ray -o address=10.0.0.1:6379 --nodes 4 -n 2 --resources cpus=4 train.py
    """

    extra = "ray"
    packages = ("ray",)
    options = MappingProxyType(
        {
            "address": "the cluster: HOST:PORT, ray://HOST:PORT, auto, or local for a new one",
            "wait": f"seconds to wait for room in the cluster (default {_WAIT_S:g})",
        }
    )
    is_elastic = True
    can_ship = True

    @property
    def dumps(self) -> Callable[[Any], bytes]:
        """Functions of scripts and notebooks travel by value."""
        from ray import cloudpickle

        dumps: Callable[[Any], bytes] = cloudpickle.dumps
        return dumps

    def check(self, job: JobSpec) -> None:
        """Refuse a secret file, and a `wait` that is not a number."""
        super().check(job)
        check_secret(job, self.name)
        parse_wait(job, self.name, default=_WAIT_S)

    def run(self, job: JobSpec, *, console: Console) -> Outcome:
        """Place actors, run the job, and leave neither actor nor placement group behind."""
        wait_s = parse_wait(job, self.name, default=_WAIT_S)
        try:
            with connected(job, console):
                return run_job(job, RayDriver(job, console, wait_s=wait_s), console)
        except (KeyboardInterrupt, signals.Stopped) as error:  # while the cluster was starting
            return Outcome.stopped_by(signals.number_of(error))
