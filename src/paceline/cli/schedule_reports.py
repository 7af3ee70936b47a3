"""Results of `paceline schedule list | show | simulate | compare`, as plain values and as text."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from paceline.cli import entries
from paceline.cli.arguments import schedule as arguments
from paceline.errors import ConfigError

if TYPE_CHECKING:
    from types import ModuleType

    from paceline.schedule.program import Op
    from paceline.schedule.simulation.simulate import Conditions
    from paceline.schedule.topology import Topology

_SHORT_LIST = 64


def describe_algorithm(name: str, module: ModuleType) -> dict[str, Any]:
    """Return name, operations, aliases, options, and the paper, cost and ranks that its docstring names."""
    text = inspect.getdoc(module) or ""
    summary, _, rest = text.partition("\n")
    fields: dict[str, str] = {}
    key = ""
    for line in rest.strip().splitlines():
        head = re.match(r"(Source|Cost|Ranks)\b(?=[^.]*:)[,:]\s*", line)
        if head is not None:
            key = head[1].lower()
            fields[key] = line[head.end() :].strip()
        elif key and line.strip():
            fields[key] += " " + line.strip()
    from paceline import collectives

    return {
        "name": name,
        "summary": summary,
        "operations": list(module.OPERATIONS),
        "aliases": list(getattr(module, "ALIASES", ())),
        "options": collectives.option_names(name),
        "ranks": fields.get("ranks", "").replace("[tested]", "").strip().rstrip("."),
        "source": fields.get("source", ""),
        "cost": fields.get("cost", ""),
    }


def print_list(operation: str | None, *, as_json: bool) -> None:
    """Print every algorithm, or those for `operation`, as text or JSON."""
    from paceline import collectives
    from paceline.schedule import contract

    if operation is not None:
        contract.base_operation(operation)
    rows = [
        describe_algorithm(name, module)
        for name, module in collectives.algorithms().items()
        if operation is None or operation in module.OPERATIONS
    ]
    if as_json:
        typer.echo(json.dumps(rows))
        return
    for row in rows:
        also = f"  (also: {', '.join(row['aliases'])})" if row["aliases"] else ""
        keys = ("summary", "operations", "ranks", "cost", "source", "options")
        facts = {k: ", ".join(row[k]) if isinstance(row[k], list) else row[k] for k in keys}
        entries.show(f"{row['name']}{also}", facts)


def network(text: str, num_ranks: int | None) -> Topology:
    """Return the topology; the ConfigError asks for --ranks if that is missing."""
    from paceline.schedule import topologies

    try:
        return topologies.parse(text, num_ranks=num_ranks)
    except ConfigError as error:
        if num_ranks is None and "missing a required" in str(error):
            raise ConfigError(f"topology {text} does not say how many ranks: add --ranks") from error
        raise


def show(
    name: str,
    options: dict[str, Any],
    *,
    operation: str,
    num_ranks: int,
    root: int,
    topology: str,
    num_bytes: int,
    folder: Path,
    files: Mapping[str, Path | None],
) -> dict[str, Any]:
    """Return the steps as text and values; write the picture, the page and the trace."""
    from paceline import collectives
    from paceline.schedule.drawing import draw
    from paceline.schedule.simulation.simulate import simulate
    from paceline.schedule.simulation.trace import chrome_trace

    net = network(topology, num_ranks)
    options = collectives.with_hosts(name, options, net.hosts)
    program = arguments.build(name, operation, num_ranks, root=root, **options)
    hosts = hosts_of(name, options, num_ranks)
    caption = describe_algorithm(name, collectives.find(name))["summary"]
    if hosts is not None:
        sizes = sorted({hosts.count(h) for h in hosts})
        each = f"{sizes[0]}" if len(sizes) == 1 else f"{sizes[0]} to {sizes[-1]}"
        caption = f"{caption.rstrip('.')}; here {len(set(hosts))} hosts of {each} ranks (L)."
    lines = draw.text(program)
    run = simulate(program, net, num_bytes, record=True)
    made = {
        "svg": draw.svg(program, caption=caption, hosts=hosts),
        "html": draw.html(program, caption=caption, hosts=hosts),
        "trace": json.dumps(chrome_trace(run, net, title=str(program))),
    }
    chosen_only = any(files.values())
    written = {}
    for kind, suffix in (("svg", ".svg"), ("html", ".html"), ("trace", ".trace.json")):
        path = files[kind] or (None if chosen_only else folder / f"{name}-{operation}-{num_ranks}{suffix}")
        if path is not None:
            write(path, made[kind])
            written[kind] = str(path)
    steps = [[_plain(op) for op in step.ops()] for step in program.steps()]
    return {
        "algorithm": name,
        "operation": operation,
        "ranks": num_ranks,
        "root": root,
        "chunks": program.num_chunks,
        "channels": program.num_channels,
        "steps": steps,
        "text": lines,
        "files": written,
    }


def _plain(op: Op) -> dict[str, Any]:
    from paceline.schedule.program import Buffer, TransferKind

    row = {field: int(getattr(op, field)) for field in op.__slots__}
    named = {
        "kind": TransferKind(op.kind).name.lower(),
        "src_buffer": Buffer(op.src_buffer).name.lower(),
        "dst_buffer": Buffer(op.dst_buffer).name.lower(),
    }
    return {**row, **named}


def hosts_of(name: str, options: Mapping[str, Any], num_ranks: int) -> list[str] | None:
    """Return each rank's host as the algorithm groups them; None for one that knows no hosts."""
    from paceline import collectives

    if "hosts" not in collectives.option_names(name):
        return None
    from paceline.schedule.hosts import members

    hosts = [""] * num_ranks
    for number, ranks in enumerate(members(num_ranks, options.get("hosts"))):
        for rank in ranks.tolist():
            hosts[rank] = f"host {number}"
    return hosts


def write(path: Path, text: str) -> None:
    """Write a file; ConfigError if that is impossible."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error}") from error


def simulate(
    name: str,
    options: dict[str, Any],
    *,
    operation: str,
    num_ranks: int | None,
    num_bytes: int,
    topology: str,
    root: int,
    conditions: Conditions,
    trace: Path | None,
    per_rank: bool,
) -> dict[str, Any]:
    """Simulate one algorithm; return times, steps and bytes."""
    from paceline import collectives
    from paceline.schedule.simulation.simulate import Conditions
    from paceline.schedule.simulation.simulate import simulate as run_it
    from paceline.schedule.simulation.trace import chrome_trace

    net = network(topology, num_ranks)
    p = net.num_ranks
    options = collectives.with_hosts(name, options, net.hosts)
    program = arguments.build(name, operation, p, root=root, **options)
    run = run_it(program, net, num_bytes, conditions=conditions, record=trace is not None)
    closed, uniform = None, net.uniform()
    if uniform is not None and conditions == Conditions():
        claim = collectives.cost(name, operation, p, root=root, **options)
        closed = claim.time_s(
            num_bytes if operation != "barrier" else 0,
            latency_s=uniform[0],
            seconds_per_byte=uniform[1],
            reduce_seconds_per_byte=net.reduce_seconds_per_byte,
        )
    if trace is not None:
        write(trace, json.dumps(chrome_trace(run, net, title=str(program))))
    report = {
        "algorithm": name,
        "operation": operation,
        "ranks": p,
        "num_bytes": num_bytes,
        "topology": net.name,
        "time_s": run.time_s,
        "closed_form_time_s": closed,
        "steps": run.steps,
        "bytes_sent_per_rank": run.bytes_sent_per_rank,
        "first_finish_s": float(run.finish_s.min()),
    }
    if per_rank:
        report |= {"finish_s": run.finish_s.tolist(), "sent_bytes": run.sent_bytes.tolist()}
    return report


def describe(report: Mapping[str, Any]) -> str:
    """Return the text form of what `simulate` returned."""
    closed = report["closed_form_time_s"]
    what = f"{report['algorithm']} {report['operation']} of {arguments.human_bytes(report['num_bytes'])}"
    lines = [
        f"{what} on {report['ranks']} ranks, {report['topology']}",
        f"  time         {arguments.human_s(report['time_s'])}",
        f"  closed form  {arguments.human_s(closed) if closed is not None else 'none for this topology'}",
        f"  steps        {report['steps']}",
        f"  sent         {arguments.human_bytes(report['bytes_sent_per_rank'])} by the busiest rank",
    ]
    return "\n".join(lines)


def compare(
    *,
    operation: str,
    num_ranks: int | None,
    topology: str,
    sizes: Sequence[int],
    algorithms: str | None,
    root: int,
    conditions: Conditions,
) -> dict[str, Any]:
    """Compare algorithms at every size; return the rows, the crossovers and what was skipped."""
    from paceline import collectives, spec
    from paceline.schedule import contract
    from paceline.schedule.simulation.compare import compare as compare_them

    contract.base_operation(operation)
    net = network(topology, num_ranks)
    texts = spec.split_list(algorithms) if algorithms else list(collectives.algorithms())
    candidates, skipped = {}, {}
    for text in texts:
        name, options = arguments.algorithm(text)
        options = collectives.with_hosts(name, options, net.hosts)
        answer = collectives.supports(name, operation, net.num_ranks, **options)
        reason = "" if answer else str(answer)
        reason = reason or arguments.oversized(name, operation, net.num_ranks, **options)
        if reason:
            skipped[text] = reason
        else:
            candidates[text] = arguments.build(name, operation, net.num_ranks, root=root, **options)
    result = compare_them(candidates, net, sizes, conditions=conditions)
    return {
        "operation": operation,
        "ranks": net.num_ranks,
        "topology": net.name,
        "rows": [
            {
                "num_bytes": r.num_bytes,
                "fastest": r.fastest,
                "time_s": r.times_s[r.fastest],
                "times_s": r.times_s,
            }
            for r in result.rows
        ],
        "crossovers": [
            {"num_bytes": c.num_bytes, "from": c.before, "to": c.after} for c in result.crossovers
        ],
        "skipped": skipped,
    }


def print_comparison(report: Mapping[str, Any]) -> None:
    """Print what `compare` returned as a table."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    table = Table(
        title=f"{report['operation']} on {report['ranks']} ranks, {report['topology']}", title_justify="left"
    )
    for heading in ("size", "fastest", "time", "runner-up", "slower by"):
        table.add_column(heading, justify="left" if heading in ("fastest", "runner-up") else "right")
    for row in report["rows"]:
        names = list(row["times_s"])
        second = names[1] if len(names) > 1 else ""
        ratio = row["times_s"][second] / row["time_s"] if second and row["time_s"] else 1.0
        size, time = arguments.human_bytes(row["num_bytes"]), arguments.human_s(row["time_s"])
        table.add_row(size, row["fastest"], time, second, f"{(ratio - 1) * 100:.0f} %" if second else "")
    console.print(table)
    if not report["crossovers"]:
        console.print(f"No crossover: {report['rows'][0]['fastest']} is fastest at every size.")
    for c in report["crossovers"]:
        console.print(f"from {arguments.human_bytes(c['num_bytes'])} on: {c['to']} (below: {c['from']})")
