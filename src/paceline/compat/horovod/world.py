"""Who takes part: `init`, `shutdown`, ranks and sizes, process sets."""

from __future__ import annotations

import atexit
import os
from collections.abc import Callable, Sequence

from paceline.compat.horovod.engine import OperationThread
from paceline.compat.horovod.membership import Membership
from paceline.compat.horovod.perform import SubmittedOperation
from paceline.compat.horovod.request import Request
from paceline.compat.horovod.timeline import Timeline
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

    def included(self) -> bool | None:
        """Whether this process belongs to it; None while its ranks are unknown."""
        return None if self.ranks is None else rank() in self.ranks

    def rank(self) -> int | None:
        """Return this process's place in it, None before it is added.

        Raises:
            ValueError: This process does not belong to it.
        """
        if self.process_set_id is None or self.ranks is None:
            return None
        if rank() not in self.ranks:
            raise ValueError(f"rank {rank()} is not in {self}")
        return self.ranks.index(rank())

    def size(self) -> int | None:
        """Return the number of its ranks, None before it is added."""
        return None if self.process_set_id is None or self.ranks is None else len(self.ranks)

    def __repr__(self) -> str:
        return f"ProcessSet(process_set_id={self.process_set_id}, ranks={self.ranks})"


def members(process_set: ProcessSet) -> list[int]:
    """Return the ranks of a process set; ValueError if it was not added."""
    if process_set.process_set_id is None or process_set.ranks is None:
        raise ValueError(f"{process_set} is not registered: give it to hvd.init() or hvd.add_process_set()")
    current()
    return process_set.ranks


def place_in(process_set: ProcessSet) -> int:
    """Return this process's place in a process set; ValueError if it was not added or this is no member."""
    ranks = members(process_set)
    if rank() not in ranks:
        raise ValueError(f"rank {rank()} is not in {process_set}")
    return ranks.index(rank())


global_process_set = ProcessSet([])
global_process_set.process_set_id = 0


class World:
    """What exists between `init` and `shutdown`."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.comm: Communicator = job.comm
        self.membership = Membership(self.comm)
        self.registered: dict[int, ProcessSet] = {0: global_process_set}
        global_process_set.ranks = self.membership.ranks[0]
        setting = os.environ.get
        self.timeline = Timeline(self.comm.now)
        path = setting("HOROVOD_TIMELINE", "")
        if path not in ("", "DYNAMIC"):
            self.start_timeline(
                path, mark_cycles=setting("HOROVOD_TIMELINE_MARK_CYCLES", "0") not in ("0", "")
            )
        self.engine = OperationThread(
            self.comm,
            self.membership,
            timeline=self.timeline,
            fusion_bytes=int(setting("HOROVOD_FUSION_THRESHOLD", str(64 << 20))),
            stall_warning_s=_stall_warning_s(),
            stall_shutdown_s=float(setting("HOROVOD_STALL_SHUTDOWN_TIME_SECONDS", "0")),
        )

    def start_timeline(self, path: str, *, mark_cycles: bool) -> None:
        """Record a timeline, if this is rank 0."""
        if self.comm.rank == 0:
            self.timeline.start(path, mark_cycles=mark_cycles)

    def add(self, process_set: ProcessSet) -> None:
        """Give `process_set` a number and a communicator; every rank must call it.

        Raises:
            ValueError: Its ranks are not some of the job's, or a process set of these ranks exists.
        """
        ranks = process_set.ranks or []
        if not ranks or not all(0 <= r < self.comm.size for r in ranks):
            raise ValueError(f"{process_set}: ranks 0..{self.comm.size - 1} expected, got {ranks}")
        known = self.membership.find(ranks)
        if known is not None:
            raise ValueError(
                f"Attempted to add a duplicate process set: {process_set}; the set with number {known} has "
                "these ranks: use hvd.process_set_by_id"
            )
        number = self._change("add_process_set", ranks)
        process_set.process_set_id = number
        self.registered[number] = process_set

    def remove(self, process_set_id: int) -> None:
        """Forget a process set; every rank must call it, and all return when all have."""
        self._change("remove_process_set", [process_set_id])
        # The object that was added becomes void, also where another one was given.
        self.registered.pop(process_set_id).process_set_id = None

    def _change(self, kind: str, numbers: list[int]) -> int:
        request = Request(f"{kind}.{'.'.join(map(str, numbers))}", kind, splits=numbers)
        handle = self.engine.submit(SubmittedOperation(request))
        handle.wait()
        return handle.number


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
    if isinstance(process_sets, str) and process_sets.lower() != "dynamic":
        raise ConfigError(f'process_sets takes a list or "dynamic"; got {process_sets!r}')
    given = [] if process_sets is None or isinstance(process_sets, str) else list(process_sets)
    if _world is not None:
        return
    _world = World(init_job(progress=False))
    for callback in _on_init:
        callback()
    for process_set in given:
        if process_set.ranks is not None and _world.membership.find(process_set.ranks) is None:
            _world.add(process_set)
        else:
            # Of two equal sets the first counts.
            process_set.process_set_id = None


def shutdown() -> None:
    """Leave; operations in flight fail. `init` may be called again."""
    global _world
    if _world is None:
        return
    world, _world = _world, None
    world.engine.stop()
    world.membership.close(goodbye=not world.engine.has_failed, whole_job=False)
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
    """Add a process set after `init`; every rank calls it with the same ranks.

    Args:
        process_set: A set, or its ranks.

    Returns:
        The set, with its number.

    Raises:
        ValueError: Ranks that the job does not have, or a set with the same ranks exists.
        HorovodInternalError: Ranks disagree about the set.
    """
    added = process_set if isinstance(process_set, ProcessSet) else ProcessSet(process_set)
    current().add(added)
    return added


def remove_process_set(process_set: ProcessSet) -> bool:
    """Forget a process set; every rank of the job calls it, in the set or not, and waits for the others.

    Operations of the set that are in flight fail.

    Args:
        process_set: A set that was added.

    Returns:
        Whether it was removed: False for the global one and for one that is not registered.
    """
    world, process_set_id = current(), process_set.process_set_id
    if not process_set_id or process_set_id not in world.registered:
        return False
    world.remove(process_set_id)
    process_set.process_set_id = None
    return True


def process_set_by_id(process_set_id: int) -> ProcessSet:
    """Return the registered process set of that id; ValueError if there is none."""
    try:
        return current().registered[process_set_id]
    except KeyError:
        raise ValueError(f"no process set has id {process_set_id}") from None


def start_timeline(file_path: str | os.PathLike[str], mark_cycles: bool = False) -> None:
    """Record the operations of this job into a Chrome trace, on rank 0; other ranks write nothing.

    Args:
        file_path: File of rank 0, which is overwritten; a recording under way ends and goes on in it.
        mark_cycles: Also mark when the background thread begins a round; default no.

    Raises:
        ValueError: `init` was not called.
    """
    current().start_timeline(os.fspath(file_path), mark_cycles=mark_cycles)


def stop_timeline() -> None:
    """End the recording and close its file; ValueError if `init` was not called."""
    current().timeline.stop()
