"""Supervisors as Ray actors: one placement group, and one actor per worker."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from typing import TYPE_CHECKING, Any

from paceline.errors import CommError, ConfigError
from paceline.launchers.job import JobSpec, Resources
from paceline.launchers.processes import signals
from paceline.launchers.processes.console import Console
from paceline.launchers.remote.driver import DEFAULT_RESTARTS, Driver
from paceline.launchers.remote.events import Event, ExitEvent, LostEvent
from paceline.launchers.remote.supervisor import StartCommand, Supervisor, WorkerLocation

if TYPE_CHECKING:
    from ray import ObjectRef
    from ray.actor import ActorHandle
    from ray.util.placement_group import PlacementGroup

_LONG_POLL_S = 2.0
_CALL_S = 120.0
_RESTART_S = 60.0
# Lines with which Ray's messages begin the tables that `_reason` leaves out.
_TABLE = ("class_name", "actor_id", "pid", "name", "namespace", "ip")


class SupervisorActor(Supervisor):
    """A supervisor as a Ray actor."""

    def location(self) -> WorkerLocation:
        """Where Ray put this actor."""
        import ray

        node = ray.get_runtime_context().get_node_id()
        return WorkerLocation(host=node, name=socket.gethostname(), address=ray.util.get_node_ip_address())


class RayDriver(Driver):
    """Supervisors in actors. Calls to an actor that died raise; `gather` waits until Ray has restarted it.

    Args:
        job: What to run.
        console: Where it says that it continues with fewer workers.
        wait_s: Seconds to wait for room in the cluster.
    """

    def __init__(self, job: JobSpec, console: Console, *, wait_s: float) -> None:
        self._job = job
        self._console = console
        self._wait_s = wait_s
        self._actors: list[ActorHandle[SupervisorActor]] = []
        self._group: PlacementGroup | None = None
        self._polls: dict[ObjectRef, int] = {}  # calls of `Supervisor.events` → index of the supervisor

    def gather(self) -> list[WorkerLocation]:
        self._polls.clear()
        if not self._actors:
            self._place(self._count())
        elif self._job.is_elastic and not self._all_answer():
            count = self._count()
            self._console.note(f"workers were lost for good: continuing with {count}")
            self._place(count)
        return self._locations()

    def open_store(self, index: int, secret: str, address: str | None) -> str:
        return str(self._get(self._actors[index].open_store.remote(secret, address)))

    def start(self, index: int, command: StartCommand) -> None:
        self._get(self._actors[index].start.remote(command))
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
                events: list[Event] = self._get(reference)
            except CommError as error:
                found.append((index, LostEvent(str(error))))
                continue
            found += [(index, event) for event in events]
            if not events or not isinstance(events[-1], ExitEvent):
                self._polls[self._actors[index].events.remote(_LONG_POLL_S)] = index
        return found

    def stop(self, grace_s: float, attempt: int) -> None:
        for actor in self._actors:
            actor.stop.remote(grace_s, attempt)

    def prepare_restart(self) -> None:
        """Nothing: Ray has restarted the actors that died."""

    def close(self, *, succeeded: bool) -> None:
        import ray
        from ray.util.placement_group import remove_placement_group

        for actor in self._actors:
            with contextlib.suppress(Exception):  # it may be dead, or the cluster gone
                ray.kill(actor, no_restart=True)
        if self._group is not None:
            with contextlib.suppress(Exception):
                remove_placement_group(self._group)
        self._actors = []
        self._group = None

    def _count(self) -> int:
        """How many workers to start: those asked for, or those that fit within the elastic bounds."""
        job = self._job
        if not job.is_elastic:
            return job.total_workers
        least, most = job.min_workers or job.total_workers, job.max_workers or job.total_workers
        deadline = time.monotonic() + self._wait_s
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
        """What one worker needs, in Ray's words."""
        needs = self._job.resources or Resources()
        bundle = {"CPU": needs.cpus, "GPU": needs.gpus, "memory": float(needs.memory_bytes or 0)}
        return {name: amount for name, amount in bundle.items() if amount} or {"CPU": 0.001}

    def _place(self, count: int) -> None:
        """Reserve room for `count` workers and start their actors in it."""
        # Workers per bundle: all of a host if they are spread over hosts, else one.
        is_spread = self._job.nodes > 1 and count == self._job.total_workers
        share = self._job.num_workers if is_spread else 1
        group = self._reserve(count, share, is_spread=is_spread)
        self._actors = self._start_actors(group, count, share)

    def _reserve(self, count: int, share: int, *, is_spread: bool) -> PlacementGroup:
        import ray
        from ray.util.placement_group import placement_group

        job, bundle = self._job, self._bundle()
        bundles = [{name: amount * share for name, amount in bundle.items()}] * (count // share)
        group = placement_group(
            bundles, strategy="STRICT_SPREAD" if is_spread else "PACK", name=f"paceline:{job.name}"
        )
        self._group = group  # so that `close` removes it whatever happens here
        deadline = time.monotonic() + self._wait_s
        while not (is_placed := group.wait(1)) and time.monotonic() < deadline:
            signals.check()
        if not is_placed:
            has = {k: v for k, v in ray.cluster_resources().items() if k in ("CPU", "GPU", "memory")}
            where = f"on {job.nodes} different nodes " if is_spread else ""
            self.close(succeeded=False)
            raise ConfigError(
                f"engine ray: no room for {count} workers of {bundle} {where}within {self._wait_s:g} s; the"
                f" cluster has {has} in total. Ask for less (-n, --resources), or wait longer (-o wait=)"
            )
        return group

    def _start_actors(
        self, group: PlacementGroup, count: int, share: int
    ) -> list[ActorHandle[SupervisorActor]]:
        import ray
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        job, bundle = self._job, self._bundle()
        restarts = DEFAULT_RESTARTS if job.max_restarts is None else job.max_restarts
        actor_class = ray.remote(SupervisorActor)
        return [
            actor_class.options(
                num_cpus=bundle.get("CPU", 0),
                num_gpus=bundle.get("GPU", 0),
                memory=bundle.get("memory"),
                max_restarts=restarts,
                max_concurrency=8,
                scheduling_strategy=PlacementGroupSchedulingStrategy(group, i // share),
                name=f"paceline:{job.name}:{os.getpid()}:{i}",
            ).remote()
            for i in range(count)
        ]

    def _all_answer(self) -> bool:
        """Whether all actors answer within the time to wait for room."""
        import ray

        calls = [actor.location.remote() for actor in self._actors]
        with contextlib.suppress(ray.exceptions.RayActorError):
            return len(ray.wait(calls, num_returns=len(calls), timeout=self._wait_s)[0]) == len(calls)
        return False

    def _locations(self) -> list[WorkerLocation]:
        """Where all actors are; waits while Ray restarts some of them."""
        deadline = time.monotonic() + max(_RESTART_S, self._wait_s)
        while True:
            calls = [actor.location.remote() for actor in self._actors]
            try:
                return [self._get(call) for call in calls]
            except CommError:
                if time.monotonic() > deadline:
                    raise
                signals.check()
                time.sleep(0.5)

    def _get(self, reference: ObjectRef) -> Any:
        """The result of a call to an actor. Raises what the actor raised, or CommError if it died."""
        import ray

        try:
            return ray.get(reference, timeout=max(_CALL_S, self._wait_s))
        except ray.exceptions.RayTaskError as error:
            raise error.cause from None
        except (ray.exceptions.RayError, ray.exceptions.GetTimeoutError) as error:
            raise CommError(f"its Ray actor died: {_reason(error)}") from None


def _reason(error: Exception) -> str:
    """Ray's explanation without its tables."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    sentences = [line for line in lines if not line.startswith(_TABLE)]
    return " ".join(sentences[:3])[:400]
