"""Who takes part: `init`, `shutdown`, ranks and sizes, process sets."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Sequence

from paceline.compat.horovod.engine import OperationThread
from paceline.errors import ConfigError
from paceline.train.job import Job
from paceline.train.joining import init as init_job
from paceline.types import Communicator


class ProcessSet:
    """Some of the ranks, for collectives among themselves."""

    def __init__(self, ranks_or_comm: Sequence[int]) -> None:
        ranks = list(ranks_or_comm) if isinstance(ranks_or_comm, Sequence | range) else None
        if ranks is None or any(not isinstance(r, int) for r in ranks):
            raise ValueError(
                f"a process set is a list of ranks, not an MPI communicator; got {ranks_or_comm!r}"
            )
        self.ranks: list[int] | None = sorted(set(ranks))
        self.process_set_id: int | None = None

    def included(self) -> bool:
        """Whether this process belongs to it."""
        return rank() in self._known()

    def rank(self) -> int:
        """Return this process's place in it."""
        return self._known().index(rank())

    def size(self) -> int:
        """Return the number of its ranks."""
        return len(self._known())

    def _known(self) -> list[int]:
        if self.process_set_id is None or self.ranks is None:
            raise ValueError(
                "this process set is not registered: give it to hvd.init() or hvd.add_process_set()"
            )
        return self.ranks

    def __repr__(self) -> str:
        return f"ProcessSet(process_set_id={self.process_set_id}, ranks={self.ranks})"


global_process_set = ProcessSet([])
global_process_set.process_set_id = 0


class World:
    """What exists between `init` and `shutdown`."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.comm: Communicator = job.comm
        self.communicators: dict[int, Communicator] = {0: self.comm}
        self.ranks: dict[int, list[int]] = {0: list(range(self.comm.size))}
        self.registered: dict[int, ProcessSet] = {0: global_process_set}
        self.next_id = 1
        global_process_set.ranks = self.ranks[0]
        setting = os.environ.get
        self.engine = OperationThread(
            self.comm,
            self.communicators,
            self.ranks,
            fusion_bytes=int(setting("HOROVOD_FUSION_THRESHOLD", str(64 << 20))),
            stall_warning_s=_stall_warning_s(),
            stall_shutdown_s=float(setting("HOROVOD_STALL_SHUTDOWN_TIME_SECONDS", "0")),
        )

    def register(self, process_set: ProcessSet) -> None:
        """Give `process_set` an id and a communicator; every rank must call it."""
        assert process_set.ranks is not None
        outside = [r for r in process_set.ranks if not 0 <= r < self.comm.size]
        if outside or not process_set.ranks:
            raise ValueError(
                f"{process_set}: ranks 0..{self.comm.size - 1} expected, got {process_set.ranks}"
            )
        for process_set_id, ranks in self.ranks.items():
            if ranks == process_set.ranks:
                process_set.process_set_id = process_set_id
                return
        process_set.process_set_id = self.next_id
        self.next_id += 1
        # The engine's thread uses these communicators: it must be idle while ranks form a new one.
        part = self.comm.split(process_set.ranks)
        if part is not None:
            self.communicators[process_set.process_set_id] = part
        self.ranks[process_set.process_set_id] = process_set.ranks
        self.registered[process_set.process_set_id] = process_set
        # Requests for it must not reach rank 0 before rank 0 knows it.
        self.comm.barrier().wait()


def _stall_warning_s() -> float:
    if os.environ.get("HOROVOD_STALL_CHECK_DISABLE", "0") not in ("0", ""):
        return 0.0
    return float(os.environ.get("HOROVOD_STALL_CHECK_TIME_SECONDS", "60"))


_world: World | None = None


_on_init: list[Callable[[], None]] = []


def on_init(callback: Callable[[], None]) -> None:
    """Call `callback` after every `init`."""
    _on_init.append(callback)


def current() -> World:
    """Return the initialised world, or say that `hvd.init()` is missing."""
    if _world is None:
        raise ValueError("Horovod has not been initialized; use hvd.init().")
    return _world


def init(comm: Sequence[int] | None = None, process_sets: Sequence[ProcessSet] | str | None = None) -> None:
    """Join the other workers. `process_sets`: registered at once, in this order on every rank."""
    global _world  # noqa: PLW0603  (one world per process, as the interface has it)
    if comm is not None:
        raise NotImplementedError("hvd.init(comm=…): start only the ranks you need, or use process_sets")
    if _world is not None:
        return
    _world = World(init_job(progress=False))
    for callback in _on_init:
        callback()
    if process_sets is not None and not isinstance(process_sets, str):
        for process_set in process_sets:
            _world.register(process_set)
    elif isinstance(process_sets, str) and process_sets != "dynamic":
        raise ConfigError(f'process_sets takes a list or "dynamic"; got {process_sets!r}')


def shutdown() -> None:
    """Leave; operations in flight fail. `init` may be called again."""
    global _world
    if _world is None:
        return
    world, _world = _world, None
    world.engine.stop()
    for process_set_id, communicator in list(world.communicators.items()):
        if process_set_id != 0:
            communicator.close()
    world.job.close()
    for process_set_id, process_set in world.registered.items():
        if process_set_id != 0:
            process_set.process_set_id = None


atexit.register(shutdown)


def is_initialized() -> bool:
    """Whether `init` was called (and `shutdown` was not)."""
    return _world is not None


def rank() -> int:
    """Return this process's rank in the job."""
    return current().comm.rank


def size() -> int:
    """Return the number of processes of the job."""
    return current().comm.size


def _neighbours() -> list[int]:
    comm = current().comm
    return [r for r, host in enumerate(comm.hosts) if host == comm.hosts[comm.rank]]


def local_rank() -> int:
    """Return this process's rank among those of its host."""
    return _neighbours().index(rank())


def local_size() -> int:
    """Return the number of processes on this host."""
    return len(_neighbours())


def _peers_across() -> list[int]:
    """Ranks with this process's local rank, one per host that has as many."""
    comm, place = current().comm, local_rank()
    seen: dict[str, int] = {}
    found = []
    for r, host in enumerate(comm.hosts):
        if seen.get(host, 0) == place:
            found.append(r)
        seen[host] = seen.get(host, 0) + 1
    return found


def cross_rank() -> int:
    """Return this host's place among the hosts that have this local rank."""
    return _peers_across().index(rank())


def cross_size() -> int:
    """Return the number of hosts that have this local rank."""
    return len(_peers_across())


def is_homogeneous() -> bool:
    """Whether every host runs equally many processes."""
    hosts = list(current().comm.hosts)
    return len({hosts.count(h) for h in hosts}) == 1


def add_process_set(process_set: ProcessSet | Sequence[int]) -> ProcessSet:
    """Register a process set after `init`; every rank calls it with the same ranks and nothing in flight."""
    added = process_set if isinstance(process_set, ProcessSet) else ProcessSet(process_set)
    current().register(added)
    return added


def remove_process_set(process_set: ProcessSet) -> bool:
    """Forget a process set on every rank; False for the global one or one that is not registered."""
    world, process_set_id = current(), process_set.process_set_id
    if process_set_id is None or process_set_id == 0 or process_set_id not in world.ranks:
        return False
    communicator = world.communicators.pop(process_set_id, None)
    if communicator is not None:
        communicator.close()
    del world.ranks[process_set_id], world.registered[process_set_id]
    process_set.process_set_id = None
    return True


def process_set_by_id(process_set_id: int) -> ProcessSet:
    """Return the registered process set of that id; ValueError if there is none."""
    try:
        return current().registered[process_set_id]
    except KeyError:
        raise ValueError(f"no process set has id {process_set_id}") from None
