"""A simulated run as a trace for https://ui.perfetto.dev or chrome://tracing.

One process per host, two tracks per rank (sends, receives) and one for its reductions; an arrow from every
send to its receive. Time in microseconds, as the format wants it.
"""

from __future__ import annotations

from typing import Any

from paceline.errors import ConfigError
from paceline.schedule.simulation.simulate import Simulation
from paceline.schedule.topology import Topology

MAX_EVENTS = 1 << 18
_SEND, _RECEIVE, _REDUCE = 0, 1, 2


def chrome_trace(run: Simulation, topology: Topology, *, title: str = "") -> dict[str, Any]:
    """Return the trace as plain values for `json.dump`; `run` must be recorded.

    Raises ConfigError if nothing was recorded or there is too much of it.
    """
    events = run.events
    if events is None:
        raise ConfigError("a trace needs the events of the run: simulate(…, record=True)")
    if len(events.step) > MAX_EVENTS:
        raise ConfigError(f"{len(events.step)} transfers are too many for a trace; give fewer ranks")
    host = topology.host_of.tolist()
    rows: list[dict[str, Any]] = _names(topology)
    columns = (
        events.step,
        events.src_rank,
        events.dst_rank,
        events.channel,
        events.is_reduce,
        events.num_bytes,
        events.start_s * 1e6,
        events.end_s * 1e6,
        events.done_s * 1e6,
    )
    for i, row in enumerate(zip(*(c.tolist() for c in columns), strict=True)):
        step, src, dst, channel, is_reduce, num_bytes, start, end, done = row
        arguments = {"step": step + 1, "channel": channel, "bytes": num_bytes}
        common = {"cat": f"channel {channel}", "args": arguments}
        at_src = {"pid": host[src], "tid": 3 * src + _SEND}
        at_dst = {"pid": host[dst], "tid": 3 * dst + _RECEIVE}
        span = {"ph": "X", "ts": start, "dur": end - start, **common}
        rows.append({"name": f"step {step + 1} → rank {dst}", **span, **at_src})
        rows.append({"name": f"step {step + 1} ← rank {src}", **span, **at_dst})
        flow = {"name": "message", "cat": "message", "id": i}
        rows.append({"ph": "s", "ts": start, **flow, **at_src})
        rows.append({"ph": "f", "bp": "e", "ts": end, **flow, **at_dst})
        if is_reduce and done > end:
            where = {"pid": host[dst], "tid": 3 * dst + _REDUCE}
            rows.append({"name": "reduce", "ph": "X", "ts": end, "dur": done - end, **common, **where})
    return {"traceEvents": rows, "displayTimeUnit": "ms", "otherData": {"title": title}}


def _names(topology: Topology) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for number, name in enumerate(topology.host_names):
        rows.append({"ph": "M", "name": "process_name", "pid": number, "args": {"name": name}})
    for rank, number in enumerate(topology.host_of.tolist()):
        for track, word in enumerate(("sends", "receives", "reduces")):
            label = {"name": f"rank {rank} {word}"}
            rows.append(
                {"ph": "M", "name": "thread_name", "pid": number, "tid": 3 * rank + track, "args": label}
            )
    return rows
