"""Simulated time of a Program on a Topology: no processes, no events, one array operation per step.

Rules (full duplex, one-port where the topology has ports):
- A transfer starts when the data that it reads is available, both ranks have entered, and every link of its
  path is free of earlier steps. There is no barrier between steps, so pipelines and channels overlap.
- It ends after the latency of its path and the time that its slowest link needs. Transfers of one step that
  share a link (a port, a NIC of several ranks, a trunk) finish together, when the link has carried them all.
- A link is busy until then, latency included: each step of a rank costs one latency. In addition each message
  (all transfers of a step from one rank to another on one channel) costs `overhead_s` on every link.
- Combining takes `reduce_seconds_per_byte` on the destination rank, one after another, while transfers go on.
- Copies within a rank are free. Chunks are S / num_chunks bytes, not rounded to whole elements.

All of this is monotone: a later start, a slower rank or a slower link never makes anything end earlier.

If a step that repeats the one before with other chunks moves every clock by the same amount, all further
repeats do so too. Such steps are counted instead of computed: 16,384 ranks in a ring take a second.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from paceline.errors import ConfigError
from paceline.schedule.program import REDUCE, Program, Step
from paceline.schedule.simulation.readiness import ByRank, Readiness, track
from paceline.schedule.simulation.servers import Servers, raise_to
from paceline.schedule.topology import FloatArray, IntArray, Topology


@dataclass(frozen=True)
class Conditions:
    """Deviations from the topology: late ranks, slow ranks, slow links.

    `late_s`: rank → seconds that it enters after the others. `slowdown`: rank → factor on the time of all its
    transfers and reductions. `slow_links`: (src, dst) → factor on the time of transfers from src to dst.
    """

    late_s: Mapping[int, float] = field(default_factory=dict)
    slowdown: Mapping[int, float] = field(default_factory=dict)
    slow_links: Mapping[tuple[int, int], float] = field(default_factory=dict)

    def check(self, num_ranks: int) -> None:
        """ConfigError for a rank that does not exist or a value that is out of range."""
        for rank in [*self.late_s, *self.slowdown, *(r for pair in self.slow_links for r in pair)]:
            if not 0 <= rank < num_ranks:
                raise ConfigError(f"rank {rank} is not one of the ranks 0 … {num_ranks - 1}")
        for seconds in self.late_s.values():
            if not 0 <= seconds < float("inf"):
                raise ConfigError(f"a late rank: seconds of at least 0 expected, got {seconds}")
        for factor in [*self.slowdown.values(), *self.slow_links.values()]:
            if not 0 < factor < float("inf"):
                raise ConfigError(f"a slowdown: a factor above 0 expected, got {factor}")


@dataclass(frozen=True)
class Events:
    """Every transfer between ranks, in the order of steps; arrays of shape (events,)."""

    step: IntArray
    src_rank: IntArray
    dst_rank: IntArray
    channel: IntArray
    is_reduce: IntArray
    num_bytes: FloatArray
    start_s: FloatArray
    end_s: FloatArray
    """When the bytes have arrived."""
    done_s: FloatArray
    """When they have also been combined."""


@dataclass(frozen=True)
class Simulation:
    """Result of a simulated run. `finish_s`, `sent_bytes`: shape (P,); `events` if they were recorded."""

    time_s: float
    finish_s: FloatArray
    steps: int
    sent_bytes: FloatArray
    events: Events | None = None

    @property
    def bytes_sent_per_rank(self) -> float:
        """Bytes that the busiest rank sends."""
        return float(self.sent_bytes.max())


def simulate(
    program: Program,
    topology: Topology,
    num_bytes: float,
    *,
    conditions: Conditions | None = None,
    record: bool = False,
    by_chunk: bool | None = None,
) -> Simulation:
    """Simulate `program` with `num_bytes` in the full buffer (S of the cost formulas).

    `record` keeps every transfer as an event. `by_chunk`: see `readiness`; chosen by size if None.
    Raises ConfigError if topology and program differ in ranks, or for impossible conditions.
    """
    if topology.num_ranks != program.num_ranks:
        raise ConfigError(f"{program} needs a topology of {program.num_ranks} ranks; got {topology}")
    if not 0 <= num_bytes < float("inf"):
        raise ConfigError(f"number of bytes: at least 0 expected, got {num_bytes}")
    if program.operation == "barrier":
        num_bytes = 0
    conditions = conditions or Conditions()
    conditions.check(program.num_ranks)
    return _Run(program, topology, num_bytes, conditions, record, by_chunk).result()


def _per_rank(values: Mapping[int, float], num_ranks: int, default: float) -> FloatArray:
    array = np.full(num_ranks, default)
    for rank, value in values.items():
        array[rank] = value
    return array


class _Pattern:
    """Everything about a step that depends neither on which chunks it moves nor on the time."""

    def __init__(self, step: Step, run: _Run) -> None:
        self._columns = _all_but_chunks(step)
        self.src, self.dst = step.src_rank, step.dst_rank
        n, net = len(step), run.topology
        away = self.src != self.dst
        self.is_message = bool(away.any())
        self.num_bytes = step.count * run.chunk_bytes
        self.sent_bytes = np.bincount(self.src, weights=self.num_bytes * away, minlength=net.num_ranks)
        slow = np.maximum(run.slowdown[self.src], run.slowdown[self.dst]) * run.pair_factor(
            self.src, self.dst
        )
        path = net.path(self.src, self.dst, step.channel)
        self.hops = [np.ascontiguousarray(c) for c in path.T]
        self.latency_s = net.latency_s(path) * slow
        user, hop = np.nonzero(path >= 0)
        link = path[user, hop]
        overhead = np.zeros(n)
        if net.overhead_s:
            overhead[_first_of_each_message(step)] = net.overhead_s
        overhead *= slow
        work = (self.num_bytes * slow)[user] * net.link_seconds_per_byte[link] + overhead[user]
        self.links = Servers(link, user, work)
        port_s = overhead * (path >= 0).any(axis=1)
        self.alone_s = self.latency_s + port_s + self.num_bytes * slow * net.seconds_per_byte(path)
        self.adds = np.flatnonzero(step.kind == REDUCE)
        adder = self.dst[self.adds]
        cost = self.num_bytes[self.adds] * net.reduce_seconds_per_byte * run.slowdown[adder]
        self.reducers = Servers(adder, np.arange(len(adder)), cost)
        self.reduce_alone_s = cost
        self.num = n
        self.used_links = self.links.ids
        sends = np.bincount(self.src, minlength=net.num_ranks)
        receives = np.bincount(self.dst, minlength=net.num_ranks)
        self.src_once, self.dst_once = sends.max() == 1, receives.max() == 1
        self.used_ranks = np.flatnonzero(sends + receives)
        self.used_reducers = self.reducers.ids

    def fits(self, step: Step) -> bool:
        """Whether `step` differs only in which chunks it moves."""
        pairs = zip(self._columns, _all_but_chunks(step), strict=True)
        return all(a is b or np.array_equal(a, b) for a, b in pairs)


def _first_of_each_message(step: Step) -> IntArray:
    """Transfers of one step between the same ranks on the same channel travel as one message."""
    table = np.stack([step.src_rank, step.dst_rank, step.channel])
    return np.asarray(np.unique(table, axis=1, return_index=True)[1])


def _all_but_chunks(step: Step) -> tuple[IntArray, ...]:
    return (
        step.src_rank,
        step.dst_rank,
        step.count,
        step.kind,
        step.src_buffer,
        step.dst_buffer,
        step.channel,
    )


def _without_empty(step: Step) -> Step:
    """Leave out transfers of no chunks, which are never sent."""
    if step.count.all():
        return step
    some = np.flatnonzero(step.count)
    return Step(*(c[some] for c in step.columns()))


class _Run:
    """One simulation: the clocks of links, reducers and ranks, moved step by step."""

    def __init__(
        self,
        program: Program,
        topology: Topology,
        num_bytes: float,
        conditions: Conditions,
        record: bool,
        by_chunk: bool | None,
    ) -> None:
        p = program.num_ranks
        self.topology = topology
        self.chunk_bytes = num_bytes / max(program.num_chunks, 1)
        self.slowdown = _per_rank(conditions.slowdown, p, 1.0)
        pairs = sorted(conditions.slow_links.items())
        self._slow_keys = np.array([a * p + b for (a, b), _ in pairs], dtype=np.intp)
        self._slow_factors = np.array([f for _, f in pairs])
        self.entered_s = _per_rank(conditions.late_s, p, 0.0)
        self.link_free_s = np.zeros(topology.num_links + 1)  # the last one stands for "no link"
        self.reducer_free_s = np.zeros(p)
        self.finish_s = self.entered_s.copy()
        self.sent_bytes = np.zeros(p)
        self.steps = 0
        self.ready: Readiness = track(program, self.entered_s, by_chunk=by_chunk)
        self._record: list[tuple[FloatArray, ...]] | None = [] if record else None
        self._walk(program)

    def pair_factor(self, src: IntArray, dst: IntArray) -> FloatArray:
        """Factor of the slow links, shape (n,)."""
        factor = np.ones(len(src))
        if len(self._slow_keys):
            key = src * self.topology.num_ranks + dst
            at = np.minimum(np.searchsorted(self._slow_keys, key), len(self._slow_keys) - 1)
            hit = self._slow_keys[at] == key
            factor[hit] = self._slow_factors[at[hit]]
        return factor

    def result(self) -> Simulation:
        """Return what was simulated."""
        events = None
        if self._record is not None:
            joined = [np.concatenate(c) for c in zip(*self._record, strict=True)] or [np.zeros(0)] * 9
            ints = [c.astype(np.intp) for c in joined[:5]]
            events = Events(ints[0], ints[1], ints[2], ints[3], ints[4], *joined[5:])
        return Simulation(float(self.finish_s.max()), self.finish_s, self.steps, self.sent_bytes, events)

    def _walk(self, program: Program) -> None:
        pattern: _Pattern | None = None
        steady = _Steady(self) if isinstance(self.ready, ByRank) and self._record is None else None
        for whole in program.steps():
            step = _without_empty(whole)
            if not len(step):
                continue
            if pattern is None or not pattern.fits(step):
                if steady is not None:
                    steady.leave()
                pattern = _Pattern(step, self)
            self.steps += pattern.is_message
            if steady is None:
                self._advance(step, pattern)
            elif not steady.skip():
                steady.before(pattern)
                steady.after(pattern, float(self._advance(step, pattern)))
        if steady is not None:
            steady.leave()

    def _advance(self, step: Step, pattern: _Pattern) -> float:
        """Advance all clocks by one step; return the earliest start of its transfers."""
        free = self.link_free_s
        start = np.maximum(self.ready.of_sources(step), self.entered_s[pattern.dst])
        for hop in pattern.hops:
            np.maximum(start, free[hop], out=start)
        if pattern.links.is_shared:
            end = pattern.links.finish(start, pattern.num) + pattern.latency_s
            free[pattern.links.ids] = pattern.links.latest(end)
        else:
            end = start + pattern.alone_s
            for hop in pattern.hops:
                free[hop] = end
        free[-1] = 0.0
        done = end
        if len(pattern.adds):
            done = self._combine(step, pattern, end)
        self.ready.written(step, done, once=pattern.dst_once)
        raise_to(self.finish_s, pattern.src, end, once=pattern.src_once)
        raise_to(self.finish_s, pattern.dst, done, once=pattern.dst_once)
        self.sent_bytes += pattern.sent_bytes
        if self._record is not None and pattern.is_message:
            self._keep(step, pattern, start, end, done)
        return float(start.min())

    def _combine(self, step: Step, pattern: _Pattern, end: FloatArray) -> FloatArray:
        adds, clock = pattern.adds, self.reducer_free_s
        adder = pattern.dst[adds]
        begin = np.maximum(end, self.ready.of_destinations(step))[adds]
        np.maximum(begin, clock[adder], out=begin)
        done = end.copy()
        if pattern.reducers.is_shared:
            done[adds] = pattern.reducers.finish(begin, len(adds))
        else:
            done[adds] = begin + pattern.reduce_alone_s
        clock[adder] = done[adds]
        return done

    def _keep(
        self, step: Step, pattern: _Pattern, start: FloatArray, end: FloatArray, done: FloatArray
    ) -> None:
        assert self._record is not None
        away = np.flatnonzero(pattern.src != pattern.dst)
        row = (pattern.src, pattern.dst, step.channel, step.kind, pattern.num_bytes, start, end, done)
        number = np.full(len(away), self.steps - 1)
        self._record.append((number, *(np.asarray(c)[away] for c in row)))


class _Steady:
    """Detects that a repeated pattern moves every clock by the same amount, and skips its other repeats.

    This is exact: a step is a function f of the clocks. Once every transfer starts after all ranks have
    entered (their entry is a constant), f(x + c) = f(x) + c. Then f(x) = x + c implies f(f(x)) = x + 2c.
    """

    _TOLERANCE = 1e-9

    def __init__(self, run: _Run) -> None:
        assert isinstance(run.ready, ByRank)
        self._run, self._ready = run, run.ready
        self._entered_by = float(run.entered_s.max())
        self._pattern: _Pattern | None = None
        self._shift_s = 0.0
        self._skipped = 0
        self._is_steady = False
        self._misses = 0
        self._wait = 0
        self._old: list[FloatArray] = []

    def _clocks(self, pattern: _Pattern) -> list[tuple[FloatArray, IntArray]]:
        run = self._run
        return [
            (self._ready.latest_s, pattern.used_ranks),
            (run.link_free_s, pattern.used_links),
            (run.reducer_free_s, pattern.used_reducers),
            (run.finish_s, pattern.used_ranks),
        ]

    def skip(self) -> bool:
        """Count one more repeat, if the pattern is steady."""
        self._skipped += self._is_steady
        return self._is_steady

    def before(self, pattern: _Pattern) -> None:
        """Remember the clocks, unless earlier repeats say that it is too early to look again."""
        if pattern is not self._pattern:
            self._pattern, self._misses, self._wait = pattern, 0, 1
        self._wait -= 1
        self._old = [] if self._wait > 0 else [clock.copy() for clock, _ in self._clocks(pattern)]

    def after(self, pattern: _Pattern, earliest_start_s: float) -> None:
        """Compare the clocks with those before; the pattern is steady if all moved by the same amount."""
        if not self._old:
            return
        moves = [
            clock[used] - old[used]
            for (clock, used), old in zip(self._clocks(pattern), self._old, strict=True)
        ]
        moved = np.concatenate(moves) if moves else np.zeros(1)
        low, high = float(moved.min()), float(moved.max())
        if earliest_start_s > self._entered_by and high - low <= self._TOLERANCE * high:
            self._is_steady, self._shift_s = True, (low + high) / 2
        else:
            self._misses = min(self._misses + 1, 64)
            self._wait = self._misses

    def leave(self) -> None:
        """Move the clocks by the repeats that were skipped, and forget the pattern."""
        if self._skipped:
            assert self._pattern is not None
            for clock, used in self._clocks(self._pattern):
                clock[used] += self._skipped * self._shift_s
            self._run.sent_bytes += self._skipped * self._pattern.sent_bytes
        self._is_steady, self._skipped, self._pattern = False, 0, None
