"""Which algorithm an operation between hosts gets: simulated on the measured links, then measured.

The ranks measure their links, rank 0 orders all candidates with the schedule simulator, the best few race on
the real network, and the slowest rank's time counts. The table that comes out is the same on all ranks and
frozen for the job; a file per cluster keeps it, so that the next job starts with it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from paceline import collectives, user_cache
from paceline.comm import byte_string
from paceline.comm.native import uneven
from paceline.comm.native.choice import DIRECT, OPERATIONS, Choice, ChoiceTable
from paceline.comm.native.network import NetworkCommunicator
from paceline.errors import ConfigError
from paceline.schedule import topologies
from paceline.schedule.program import Program
from paceline.schedule.simulation.simulate import simulate
from paceline.schedule.topology import Topology
from paceline.types import ReduceOp

SIZES = (1 << 10, 32 << 10, 256 << 10, 1 << 20, 4 << 20)
_FINALISTS = 3
_REPEATS = 3
_TOO_LONG_S = 0.02  # beyond, bandwidth decides, and what won at the size before wins again
_PROBE_BYTES = 256 << 10
MOST_RANKS = 64  # simulating all candidates for more takes too long to do it at every job's start


def adopt(comm: NetworkCommunicator, *, again: bool = False) -> ChoiceTable:
    """Give `comm` this cluster's table: read, or measured now. Collective.

    `again` measures even if there is a file. Rank 0 reads and writes the file; the others get it from there.
    """
    path = cache_file(comm.hosts)
    text = _read(path) if comm.rank == 0 and not again else ""
    text = _from_rank_0(comm, text)
    if text:
        table = ChoiceTable.from_json(text, str(path))
    else:
        table = tune(comm)
        if comm.rank == 0:
            user_cache.replace(path, table.to_json())
    comm.selection = table
    return table


def cache_file(hosts: Sequence[str]) -> Path:
    """The file of the cluster that these hosts, with these numbers of ranks, are."""
    return user_cache.path_of("algorithms", list(hosts))


def tune(
    comm: NetworkCommunicator, operations: Sequence[str] = OPERATIONS, sizes: Sequence[int] = SIZES
) -> ChoiceTable:
    """Measure links, simulate all candidates, race the best. Collective; a second or two."""
    links, rates = measure_links(comm)
    choices: list[Choice] = []
    for operation in operations:
        stopped: Choice | None = None
        for num_bytes in sorted(sizes):
            plan = _from_rank_0(
                comm, json.dumps(_rank(operation, num_bytes, links, rates)) if comm.rank == 0 else ""
            )
            simulated: dict[str, float] = json.loads(plan)
            if stopped is not None or min(simulated.values()) > _TOO_LONG_S:
                choices.append(
                    _choice(operation, num_bytes, simulated, "simulated on the measured links", rates)
                )
                stopped = choices[-1]
                continue
            finalists = list(simulated)[:_FINALISTS]
            if DIRECT not in finalists:
                finalists.append(DIRECT)
            measured = {name: _race(comm, operation, num_bytes, name) for name in finalists}
            choices.append(_choice(operation, num_bytes, measured, "fastest when measured here", rates))
    text = ChoiceTable(tuple(choices)).to_json() if comm.rank == 0 else ""
    return ChoiceTable.from_json(_from_rank_0(comm, text), "measured")


def _choice(
    operation: str, num_bytes: int, times_s: Mapping[str, float], how: str, rates: Sequence[float]
) -> Choice:
    order = sorted(times_s, key=lambda name: (times_s[name], name))
    ranked = {name: times_s[name] for name in order}
    best = order[0]
    if len(order) == 1:
        return Choice(operation, num_bytes, best, f"{how}: {times_s[best] * 1e6:.3g} us", None, ranked)
    reason = f"{how}: {times_s[best] * 1e6:.3g} us against {times_s[order[1]] * 1e6:.3g} us"
    if uneven.parse(best, len(rates)) is not None:
        mbit = ", ".join(f"{rate * 8e-6:.3g}" for rate in rates)
        reason += f"; links differ ({mbit} Mbit/s in order of ranks), so ranks reduce shares of the buffer"
    return Choice(operation, num_bytes, best, reason, order[1], ranked)


def measure_links(comm: NetworkCommunicator) -> tuple[Topology, list[float]]:
    """Latency and bandwidth of every host's interface, and bytes/s of every rank's link. Collective.

    All pairs of ranks are tried. A rank's link is as fast as the fastest message that it received or that was
    received from it, whichever is slower: so a slow peer makes no other link look slow.
    """
    p, me = comm.size, comm.rank
    latency, per_byte = (
        torch.full((p,), 1e9, dtype=torch.float64),
        torch.full((p, p), 1e9, dtype=torch.float64),
    )
    for distance in range(1, p):
        # Every rank receives from the rank `distance` behind: every interface carries one message each way.
        dst, src = (me + distance) % p, (me - distance) % p
        round_trip_s = _fetch(comm, src, dst, 4, repeats=5)
        spent_s = max(_fetch(comm, src, dst, _PROBE_BYTES, repeats=4) - round_trip_s, 1e-9)
        latency[me] = min(float(latency[me]), round_trip_s / 2)
        per_byte[src, me] = spent_s / _PROBE_BYTES
    comm.all_reduce(latency, op=ReduceOp.MIN).wait()
    comm.all_reduce(per_byte, op=ReduceOp.MIN).wait()
    slowness = torch.maximum(per_byte.min(dim=0).values, per_byte.min(dim=1).values)
    hosts = list(dict.fromkeys(comm.hosts))
    first = [list(comm.hosts).index(h) for h in hosts]
    links = topologies.switched(
        "measured",
        comm.hosts,
        nic_latency_s=[float(latency[r]) for r in first],
        nic_seconds_per_byte=[float(slowness[r]) for r in first],
    )
    return links, (1 / slowness).tolist()


def _fetch(comm: NetworkCommunicator, src: int, dst: int, num_bytes: int, *, repeats: int) -> float:
    """Least seconds from asking `src` for a message until it arrives, while `dst` gets one from this rank.

    It leaves when it is asked for: a rank that comes late would find an unasked message there already, and
    take the slowest link for the fastest.
    """
    mine, theirs = torch.zeros(num_bytes, dtype=torch.uint8), torch.empty(num_bytes, dtype=torch.uint8)
    asked, best = torch.empty(1, dtype=torch.uint8), 1e9
    for _ in range(repeats):
        comm.barrier().wait()
        start = time.perf_counter()
        question = comm.send(torch.zeros(1, dtype=torch.uint8), src, tag=2)
        answer = comm.recv(theirs, src, tag=1)
        comm.recv(asked, dst, tag=2).wait()
        sent = comm.send(mine, dst, tag=1)
        answer.wait()
        best = min(best, time.perf_counter() - start)
        question.wait()
        sent.wait()
    return best


def _rank(operation: str, num_bytes: int, links: Topology, rates: Sequence[float]) -> dict[str, float]:
    """Simulated seconds by algorithm, fastest first."""
    p = links.num_ranks
    programs = _candidates(operation, p)
    times = {name: simulate(program, links, num_bytes).time_s for name, program in programs.items()}
    # What the core does by itself is all pairs at once, with fewer copies.
    times[DIRECT] = times.pop("all_pairs", min(times.values(), default=0.0))
    shares = uneven.best(rates) if operation == "all_reduce" and num_bytes >= uneven.SMALLEST_BYTES else None
    if shares is not None:
        program = uneven.program(uneven.parse(shares, p) or ())
        times[shares] = simulate(program, links, num_bytes).time_s
    return dict(sorted(times.items(), key=lambda item: (item[1], item[0])))


@functools.lru_cache(maxsize=len(OPERATIONS))
def _candidates(operation: str, num_ranks: int) -> dict[str, Program]:
    programs = {}
    for name in collectives.names():
        is_meant = operation in collectives.find(name).OPERATIONS
        if is_meant and collectives.supports(name, operation, num_ranks):
            with contextlib.suppress(ConfigError):  # it needs to know more than the number of ranks
                programs[name] = collectives.build(name, operation, num_ranks)
    return programs


def _race(comm: NetworkCommunicator, operation: str, num_bytes: int, algorithm: str) -> float:
    """Median seconds of the slowest rank."""
    numel = max(comm.size, num_bytes // 4 // comm.size * comm.size)
    whole, part = torch.zeros(numel), torch.zeros(numel // comm.size)
    calls: dict[str, Callable[[], Any]] = {
        "all_reduce": lambda: comm.all_reduce(whole, algorithm=algorithm),
        "reduce_scatter": lambda: comm.reduce_scatter(part, whole, algorithm=algorithm),
        "all_gather": lambda: comm.all_gather(whole, part, algorithm=algorithm),
        "broadcast": lambda: comm.broadcast(whole, algorithm=algorithm),
        "reduce": lambda: comm.reduce(whole, algorithm=algorithm),
    }
    times = []
    calls[operation]().wait()  # connections
    for _ in range(_REPEATS):
        comm.barrier().wait()
        start = time.perf_counter()
        calls[operation]().wait()
        times.append(time.perf_counter() - start)
    slowest = torch.tensor([statistics.median(times)], dtype=torch.float64)
    comm.all_reduce(slowest, op=ReduceOp.MAX).wait()
    return float(slowest)


def _from_rank_0(comm: NetworkCommunicator, text: str) -> str:
    data = torch.tensor(list(text.encode()), dtype=torch.uint8)
    return byte_string.broadcast(data, comm).numpy().tobytes().decode()


def _read(path: Path) -> str:
    """The file's text if it is a table of this version."""
    try:
        text = path.read_text()
        ChoiceTable.from_json(text, str(path))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""
    return text
