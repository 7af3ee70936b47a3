"""Workers on a Ray cluster: a placement group, and one actor per worker that keeps a process.

Ray restarts an actor that died; Paceline then starts all workers again, which resume from the job's last
checkpoint. Without a running cluster one is started on this host and ended with the job.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from types import MappingProxyType
from typing import Any

from paceline.errors import CommError, ConfigError
from paceline.launchers.job import JobSpec, Resources
from paceline.launchers.processes import signals
from paceline.launchers.processes.console import Console
from paceline.launchers.remote import driver, supervisor
from paceline.launchers.remote.supervisor import Event, Keeper, Member, Order
from paceline.launchers.runner import Engine, Outcome

_WAIT_S = 60.0
_LONG_POLL_S = 2.0
_TABLE = ("class_name", "actor_id", "pid", "name", "namespace", "ip")
_OBJECT_STORE_BYTES = 128 << 20  # of a cluster of our own: nothing but lines and results goes through it


class Ray(Engine):
    """Actors of a running Ray cluster, or of one started for the job."""

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
        """`wait` must be a number."""
        super().check(job)
        driver.check(job, self.name)
        _wait_s(job)

    def run(self, job: JobSpec, *, console: Console) -> Outcome:
        """Place actors, run the job, and leave neither actor nor placement group behind."""
        try:
            with _connected(job, console):
                return driver.work(job, _RayCrew(job, console), console)
        except (KeyboardInterrupt, signals.Stopped) as error:  # while the cluster was starting
            number = getattr(error, "sigval", signals.ENDING[1])
            return Outcome(128 + number, signal=number)


def _wait_s(job: JobSpec) -> float:
    return driver.wait_s(job, "ray", default=_WAIT_S)


@contextlib.contextmanager
def _connected(job: JobSpec, console: Console) -> Iterator[None]:
    """Inside, `ray` speaks to the cluster: the caller's, a running one, or a new one that ends with us."""
    import ray

    if ray.is_initialized():
        if job.ship is not None:
            raise ConfigError(
                "engine ray: Ray takes code along (--ship) only when it is connected; call launch before"
                " ray.init, or give ray.init a runtime_env with working_dir"
            )
        yield
        return
    address = job.engine_options.get("address") or os.environ.get("RAY_ADDRESS") or "auto"
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if job.ship is not None:
        settings["runtime_env"] = {"working_dir": str(job.ship.resolve())}
    folder = None
    try:
        try:
            if address == "local":
                raise ConnectionError
            if address != "auto":
                _probe(address)
            ray.init(address=address, **settings)
        except ConnectionError as error:
            if address not in ("local", "auto"):
                raise ConfigError(f"engine ray: no Ray cluster answers at {address}: {error}") from None
            folder = tempfile.mkdtemp(prefix="paceline-ray-")
            ray.init(address="local", **settings, **_own_cluster(job, folder))
            console.note("started a Ray cluster on this host, for this job only")
        yield
    finally:
        ray.shutdown()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _probe(address: str) -> None:
    """Raise ConnectionError at once where Ray itself would wait for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isdigit():
        raise ConfigError(
            f"engine ray: option address={address}: HOST:PORT, ray://HOST:PORT, auto or local expected"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=10.0).close()
    except (OSError, OverflowError) as error:
        raise ConnectionError(str(error)) from None


def _own_cluster(job: JobSpec, folder: str) -> dict[str, Any]:
    needs = job.resources or Resources()
    cpus = max(len(os.sched_getaffinity(0)), int(needs.cpus * job.total_workers + 0.999))
    return {
        "num_cpus": cpus,
        "include_dashboard": False,
        "object_store_memory": _OBJECT_STORE_BYTES,
        "_temp_dir": folder,
    }


class KeeperActor(Keeper):
    """A keeper as a Ray actor."""

    def member(self) -> Member:
        """Where Ray put this actor."""
        import ray

        node = ray.get_runtime_context().get_node_id()
        return Member(host=node, name=socket.gethostname(), address=ray.util.get_node_ip_address())


class _RayCrew(driver.Crew):
    """Keepers in actors. Calls to an actor that died raise; `gather` waits until Ray has restarted it."""

    def __init__(self, job: JobSpec, console: Console) -> None:
        self._job, self._console = job, console
        self._actors: list[Any] = []
        self._group: Any = None
        self._polls: dict[Any, int] = {}

    def gather(self, attempt: int) -> list[Member]:
        self._polls.clear()
        if not self._actors:
            self._place(self._count())
        elif self._is_elastic and not self._answers(_wait_s(self._job)):
            count = self._count()
            self._console.note(f"workers were lost for good: going on with {count}")
            self._place(count)
        return self._ask_all()

    def open_store(self, index: int) -> int:
        return int(self._get(self._actors[index].open_store.remote()))

    def start(self, index: int, order: Order) -> None:
        self._get(self._actors[index].start.remote(order))
        self._polls[self._actors[index].events.remote(_LONG_POLL_S)] = index

    def poll(self, wait_s: float) -> list[tuple[int, Event]]:
        import ray

        if not self._polls:
            return []
        ready, _ = ray.wait(list(self._polls), num_returns=1, timeout=wait_s)
        found: list[tuple[int, Event]] = []
        for reference in ready:
            index = self._polls.pop(reference)
            try:
                events = self._get(reference)
            except CommError as error:
                found.append((index, driver.gone(str(error))))
                continue
            found += [(index, event) for event in events]
            if not events or events[-1][0] != supervisor.END:
                self._polls[self._actors[index].events.remote(_LONG_POLL_S)] = index
        return found

    def stop(self, grace_s: float, attempt: int) -> None:
        for actor in self._actors:
            actor.stop.remote(grace_s, attempt)

    def prepare_restart(self) -> None:
        """Nothing: Ray has restarted what died."""

    def close(self, *, succeeded: bool) -> None:
        import ray
        from ray.util.placement_group import remove_placement_group

        for actor in self._actors:
            with contextlib.suppress(Exception):  # it may be dead, or the cluster gone
                ray.kill(actor, no_restart=True)
        if self._group is not None:
            with contextlib.suppress(Exception):
                remove_placement_group(self._group)
        self._actors, self._group = [], None

    @property
    def _is_elastic(self) -> bool:
        return (self._job.min_workers, self._job.max_workers) != (None, None)

    def _count(self) -> int:
        """How many workers to start: as many as asked, or what there is room for within the bounds."""
        job = self._job
        if not self._is_elastic:
            return job.total_workers
        least, most = job.min_workers or job.total_workers, job.max_workers or job.total_workers
        deadline = time.monotonic() + _wait_s(job)
        self.close(succeeded=False)
        while (room := self._room()) < most and time.monotonic() < deadline:
            if room >= max(least, min(job.total_workers, most)):
                break
            signals.check()
            time.sleep(0.5)
        return max(least, min(room, most))

    def _room(self) -> int:
        """How many workers the nodes' free resources would take."""
        from ray._private.state import available_resources_per_node

        bundle = self._bundle()
        return sum(
            int(min(free.get(name, 0.0) / amount for name, amount in bundle.items()))
            for free in available_resources_per_node().values()
        )

    def _bundle(self) -> dict[str, float]:
        needs = self._job.resources or Resources()
        bundle = {"CPU": needs.cpus, "GPU": needs.gpus, "memory": float(needs.memory_bytes or 0)}
        return {name: amount for name, amount in bundle.items() if amount} or {"CPU": 0.001}

    def _place(self, count: int) -> None:
        """Reserve room for `count` workers and start their actors in it."""
        import ray
        from ray.util.placement_group import placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        job, bundle = self._job, self._bundle()
        spread = job.nodes > 1 and count == job.total_workers
        share = job.num_workers if spread else 1
        bundles = [{name: amount * share for name, amount in bundle.items()}] * (count // share)
        self._group = placement_group(
            bundles, strategy="STRICT_SPREAD" if spread else "PACK", name=f"paceline:{job.name}"
        )
        deadline = time.monotonic() + _wait_s(job)
        while not (is_placed := self._group.wait(1)) and time.monotonic() < deadline:
            signals.check()
        if not is_placed:
            there = {k: v for k, v in ray.cluster_resources().items() if k in ("CPU", "GPU", "memory")}
            where = f"on {job.nodes} different nodes " if spread else ""
            self.close(succeeded=False)
            raise ConfigError(
                f"engine ray: no room for {count} workers of {bundle} {where}within {_wait_s(job):g} s; the"
                f" cluster has {there} in all. Ask for less (-n, --resources), or wait longer (-o wait=)"
            )
        restarts = driver.LOSSES if job.max_restarts is None else job.max_restarts
        make = ray.remote(KeeperActor)
        self._actors = [
            make.options(
                num_cpus=bundle.get("CPU", 0),
                num_gpus=bundle.get("GPU", 0),
                memory=bundle.get("memory"),
                max_restarts=restarts,
                max_concurrency=8,
                scheduling_strategy=PlacementGroupSchedulingStrategy(self._group, i // share),
                name=f"paceline:{job.name}:{os.getpid()}:{i}",
            ).remote()
            for i in range(count)
        ]

    def _answers(self, within_s: float) -> bool:
        import ray

        calls = [actor.member.remote() for actor in self._actors]
        with contextlib.suppress(ray.exceptions.RayActorError):
            return len(ray.wait(calls, num_returns=len(calls), timeout=within_s)[0]) == len(calls)
        return False

    def _ask_all(self) -> list[Member]:
        """Where everybody is; waits while Ray restarts actors."""
        deadline = time.monotonic() + max(60.0, _wait_s(self._job))
        while True:
            calls = [actor.member.remote() for actor in self._actors]
            try:
                return [self._get(call) for call in calls]
            except CommError:
                if time.monotonic() > deadline:
                    raise
                signals.check()
                time.sleep(0.5)

    def _get(self, reference: Any) -> Any:
        import ray

        try:
            return ray.get(reference, timeout=max(120.0, _wait_s(self._job)))
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError) as error:
            raise CommError(f"its Ray actor died: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    """Ray's explanation without its tables."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    told = [line for line in lines if not line.startswith(_TABLE)]
    return " ".join(told[:3])[:400]
