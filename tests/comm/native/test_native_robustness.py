"""The native fabric under asynchronous use, several communicators, dead and stopped peers, and misuse."""

from __future__ import annotations

import gc
import os
import signal
import threading
import time

import pytest
import torch
from shm_ranks import CONTEXT, finish, meeting, run, start

from paceline.comm.native import shared_memory
from paceline.errors import CommError, ConfigError, Mismatch, PeerLost, Timeout
from paceline.types import ReduceOp

pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group("processes")]
SLOW = pytest.mark.slow
FABRICS = pytest.mark.parametrize("network", [False, True], ids=["shm", "tcp"])


def asynchronous_body(comm):
    me, size = comm.rank, comm.size
    half = comm.split(list(range(size))[::-1])
    evens = comm.split([r for r in range(size) if r % 2 == 0])
    tensors, works = [], []
    for i in range(120):
        n = (1, 700, 20_000, 300_000)[i % 4]
        t = comm.allocate(n, torch.float32) if i % 3 == 0 else torch.empty(n)
        t.fill_(me + i)
        group, members = [(comm, range(size)), (half, range(size)), (evens, range(0, size, 2))][i % 3]
        if group is None:
            continue
        works.append(group.all_reduce(t))
        tensors.append((t, sum(r + i for r in members)))
        if i % 7 == 0:
            works.pop(-1).wait()
    for work in reversed(works):
        work.wait()
        assert work.is_done() and work.exception() is None
    for t, want in tensors:
        assert torch.all(t == want), (t, want)
    return half.rank


@FABRICS
def test_asynchronous_work_on_several_communicators(network):
    assert run(3, asynchronous_body, network=network) == [2, 1, 0]


def dropped_body(comm):
    """Work objects and tensors that nobody holds any more stay alive while they are in flight."""
    for i in range(6):
        comm.all_reduce(torch.full((200_000,), float(i)))
        gc.collect()
    last = torch.ones(10)
    comm.all_reduce(last).wait()
    assert torch.all(last == comm.size)


def test_dropped_works_finish():
    run(2, dropped_body)


def helper_body(comm):
    """Operations that nobody waits for finish while the ranks do something else."""
    big, small = comm.allocate(2_000_000, torch.float32).fill_(1), torch.ones(4)
    if comm.rank == 0:
        time.sleep(0.2)
    works = [comm.all_reduce(big), comm.all_reduce(small)]
    deadline = time.monotonic() + 20
    while not all(w._operation.is_done if hasattr(w, "_operation") else True for w in works):
        assert time.monotonic() < deadline, "nothing moved without a wait"
        time.sleep(0.01)
    assert torch.all(big == comm.size) and torch.all(small == comm.size)


@FABRICS
def test_progress_without_waiting(network):
    run(2, helper_body, network=network)


def threads_body(comm):
    """Several threads, each with a communicator of its own."""
    comms = [comm.split(list(range(comm.size))) for _ in range(3)]
    errors = []

    def work(c, seed):
        try:
            for i in range(60):
                t = torch.full((1 + 5000 * (i % 3),), float(c.rank + seed + i))
                c.all_reduce(t).wait()
                assert torch.all(t == sum(r + seed + i for r in range(c.size)))
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(c, 10 * i)) for i, c in enumerate(comms)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(40)
    assert not errors and not any(t.is_alive() for t in threads), errors


@FABRICS
def test_threads(network):
    run(2, threads_body, network=network)


def messages_body(comm):
    me, size = comm.rank, comm.size
    # Tags out of order, sizes beyond the ring, both directions at once.
    for n in (0, 1, 5, 1000, 100_001):
        sends = [
            comm.send(torch.full((n,), float(100 * me + 10 * tag)), (me + 1) % size, tag=tag)
            for tag in range(3)
        ]
        left = (me - 1) % size
        for tag in (2, 0, 1):
            got = torch.empty(n)
            comm.recv(got, left, tag=tag).wait()
            assert torch.all(got == 100 * left + 10 * tag)
        for work in sends:
            work.wait()
    # Any source.
    if me == 0:
        seen = set()
        for _ in range(size - 1):
            got = torch.empty(3, dtype=torch.int64)
            comm.recv(got, None, tag=9).wait()
            seen.add(int(got[0]))
        assert seen == set(range(1, size))
    else:
        comm.send(torch.full((3,), me), 0, tag=9).wait()
    # Beside collectives.
    work = comm.recv(got := torch.empty(4), (me - 1) % size, tag=1)
    comm.barrier().wait()
    comm.send(torch.full((4,), float(me)), (me + 1) % size, tag=1).wait()
    work.wait()
    assert torch.all(got == (me - 1) % size)


@FABRICS
def test_messages(network):
    run(3, messages_body, network=network)


def mismatch_body(comm):
    work = comm.all_reduce(torch.ones(10 + comm.rank))
    with pytest.raises(Mismatch, match=r"all_reduce.*rank"):
        work.wait()
    with pytest.raises(CommError, match="cannot be used"):
        comm.all_reduce(torch.ones(1))


@FABRICS
def test_mismatch(network):
    run(2, mismatch_body, network=network)


def unwatched_body(comm):
    """An operation that fails while nobody waits for it still fails the wait that comes later."""
    work = comm.all_reduce(torch.ones(300_000 + comm.rank))
    deadline = time.monotonic() + 20
    while hasattr(work, "_operation") and not work._operation.is_done:  # else it failed in the call
        assert time.monotonic() < deadline, "nothing failed without a wait"
        time.sleep(0.001)
    with pytest.raises(Mismatch):
        work.wait()


@pytest.mark.parametrize("hosts", ["aa", "ab", "aab"])
def test_failures_that_nobody_watched(hosts):
    run(len(hosts), unwatched_body, network=hosts)


def refusal_body(comm):
    with pytest.raises(ConfigError, match="MIN is not defined"):
        comm.all_reduce(torch.ones(2, dtype=torch.complex64), op=ReduceOp.MIN)
    with pytest.raises(ConfigError, match="CPU tensors"):
        comm.all_reduce(torch.ones(2, device="meta"))
    comm.barrier().wait()
    assert os.fork  # a forked child must not disturb the ranks
    pid = os.fork()
    if pid == 0:
        try:
            comm.all_reduce(torch.ones(1)).wait()
            os._exit(1)
        except CommError as error:
            os._exit(0 if "forked" in str(error) else 2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    t = torch.ones(1)
    comm.all_reduce(t).wait()
    assert t.item() == comm.size


@FABRICS
def test_refusals_and_forks(network):
    run(2, refusal_body, network=network)


def forked_rank_body(comm):
    """A child forked from a rank may be a rank of another job."""
    pid = os.fork()
    if pid == 0:
        try:
            path = f"/tmp/paceline-fork-{os.getpid()}"
            alone = shared_memory.connect(meeting(0, 1, path), timeout_s=5)
            alone.all_reduce(t := alone.allocate(5, torch.float32).fill_(2)).wait()
            alone.close()
            os.unlink(path)
            os._exit(0 if float(t.sum()) == 10 else 1)
        except BaseException:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    comm.barrier().wait()


def test_a_forked_child_can_be_a_rank():
    run(2, forked_rank_body)


def churn_body(comm, rounds):
    def resident_bytes():
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def state():
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

    core = shared_memory.engine()
    for i in range(rounds):
        if i == 10:
            before = state()
            segments = core.num_segments
            used, resident = core.allocated_bytes, resident_bytes()
        c = comm.split(list(range(comm.size)))
        t = c.allocate(1000, torch.float32)
        c.all_reduce(t).wait()
        del t
        c.close()
    comm.barrier().wait()
    time.sleep(0.1)
    assert core.num_closing_groups() <= 2
    assert core.num_segments == segments
    assert core.allocated_bytes <= used + (16 << 20)  # groups that a peer has not let go of yet
    assert resident_bytes() < resident + (32 << 20)
    assert state()[0] <= before[0] + 1 and state()[1] <= before[1] + 1, (before, state())


@pytest.mark.parametrize("rounds", [100, pytest.param(1000, marks=SLOW)])
@pytest.mark.parametrize("hosts", ["aa", "ab", "aab"])
def test_communicators_leave_nothing(rounds, hosts):
    run(len(hosts), churn_body, rounds, network=hosts, limit_s=240)


def victim_body(comm, operation, deadline_s, how):
    """Rank 1 goes away in the middle of a stream of operations; the others must hear of it."""
    comm.timeout_s = deadline_s
    n = 1 if operation == "small" else 3_000_000
    t = comm.allocate(n, torch.float32) if operation == "allocated" else torch.zeros(n)
    other, part = torch.zeros_like(t), torch.zeros(n // comm.size)
    for i in range(1_000_000):
        if comm.rank == 1 and i == (0 if operation == "recv" else 5):
            threading.Timer(0.05, lambda: os.kill(os.getpid(), how)).start()
        started = time.monotonic()
        try:
            if operation == "recv":
                comm.recv(t, 1).wait() if comm.rank != 1 else time.sleep(60)
            elif operation == "broadcast":
                comm.broadcast(t, root=1).wait()
            elif operation == "barrier":
                comm.barrier().wait()
            elif operation == "all_to_all":
                comm.all_to_all(other, t).wait()
            elif operation == "all_gather":
                comm.all_gather(other, part).wait()
            elif operation == "reduce_scatter":
                comm.reduce_scatter(part, other).wait()
            elif operation == "urgent":
                comm.all_reduce(t, priority=1).wait()
            else:
                comm.all_reduce(t).wait()
        except CommError as error:
            return type(error).__name__, str(error), time.monotonic() - started
    return None


@pytest.mark.parametrize(
    "operation",
    [
        "small",
        "private",
        *(
            pytest.param(o, marks=SLOW)
            for o in (
                "allocated",
                "broadcast",
                "recv",
                "barrier",
                "all_to_all",
                "all_gather",
                "reduce_scatter",
                "urgent",
            )
        ),
    ],
)
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP], ids=["kill", "stop"])
@FABRICS
def test_lost_peers_are_named(operation, how, network):
    if network and operation in ("allocated", "small"):
        pytest.skip("the same as private over a network")
    check_lost_peer(operation, how, network)


@pytest.mark.parametrize("how", [signal.SIGKILL, pytest.param(signal.SIGSTOP, marks=SLOW)])
def test_lost_peers_are_named_on_hosts_with_several_ranks(how):
    check_lost_peer("private", how, "aab")


def check_lost_peer(operation, how, network):
    # A death is noticed long before the deadline; with a short one, a slow start of the victim looks late.
    deadline_s = 20.0 if how == signal.SIGKILL else 1.0
    processes, pipes = start(3, victim_body, operation, deadline_s, how, network=network)
    try:
        for rank in (0, 2):
            assert pipes[rank].poll(60), f"rank {rank} hangs"
            ok, value = pipes[rank].recv()
            assert ok, value
            name, text, waited_s = value
            assert name == ("PeerLost" if how == signal.SIGKILL else "Timeout"), value
            assert "rank 1" in text and f"rank {rank}" in text, text
            assert waited_s < deadline_s + 3
    finally:
        processes[1].kill()
        finish(processes)


def late_body(comm):
    if comm.rank == 1:
        time.sleep(1.0)
        with pytest.raises(Timeout, match="rank 0 gave up"):
            for _ in range(3):
                comm.all_reduce(torch.ones(2)).wait()
        return
    work = comm.all_reduce(torch.ones(2))
    assert not work.is_done()
    with pytest.raises(Timeout, match="rank 1"):
        work.wait(0.2)
    with pytest.raises(CommError):
        comm.all_reduce(torch.ones(2))


def test_a_wait_that_times_out_poisons_the_communicator():
    run(2, late_body)


def closed_body(comm):
    if comm.rank == 1:
        return
    with pytest.raises(PeerLost, match="rank 1"):
        comm.all_reduce(torch.ones(2)).wait()
    return


def test_a_peer_that_closed():
    run(2, closed_body)


def lifetime_body(comm):
    t = comm.allocate(1 << 20, torch.float32)
    view = t[5:10]
    del t
    gc.collect()
    view.fill_(3)
    assert shared_memory.engine().allocated_bytes > 4 << 20
    del view
    gc.collect()
    again = comm.allocate(1 << 20, torch.float32)
    assert torch.all(again == 0)  # used before, zeroed again


def test_allocated_memory_lives_until_its_last_view():
    run(1, lifetime_body)


def _exit_with_work_in_flight(path):
    comm = shared_memory.connect(meeting(0, 1, path), timeout_s=5)
    comm.recv(torch.empty(3), None, tag=3)  # never comes; the helper thread is running


def test_exit_with_work_in_flight(tmp_path):
    process = CONTEXT.Process(target=_exit_with_work_in_flight, args=(str(tmp_path / "store"),))
    process.start()
    finish([process], 20)
    assert process.exitcode == 0
