"""`paceline doctor`: is this host, and the network between hosts, fit for training?"""

from __future__ import annotations

import json
import os
import socket
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from paceline.doctor.finding import Finding

_EPILOG = (
    "Between hosts, run it as a job: `paceline run --nodes 2 --rendezvous HOST:PORT -m paceline.cli.main"
    " doctor` on each, or under mpirun, srun or torchrun. Exit code 1: there is a problem; else 0."
)
_MARKS = {
    "ok": ("ok", "green"),
    "note": ("note", "cyan"),
    "warning": ("warning", "yellow"),
    "problem": ("PROBLEM", "red"),
}


def doctor(
    workers: Annotated[
        int, typer.Option("-n", "--workers", help="Also measure between so many ranks on this host.")
    ] = 1,
    hosts: Annotated[
        str | None,
        typer.Option(metavar="A,B:PORT,…", help="Hosts to look at from here: name, route, port."),
    ] = None,
    port: Annotated[int, typer.Option(help="The port to try on --hosts that name none.")] = 29400,
    timeout: Annotated[
        float, typer.Option(metavar="SECONDS", help="How long to wait for the other ranks.")
    ] = 30.0,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Check and explain interfaces, routes, names, ports, memory, limits, clocks, cores and versions; measure
    latency and bandwidth between hosts; end with what to fix.
    """
    from paceline.comm.rendezvous.environment import who_am_i
    from paceline.doctor import finding, host, network, ranks
    from paceline.errors import ConfigError

    if workers < 1 or timeout <= 0 or not 0 < port < 65536:
        raise ConfigError(
            "doctor: --workers >= 1, --timeout > 0 and a --port below 65536 expected,"
            f" got {workers}, {timeout:g} and {port}"
        )
    place = who_am_i(os.environ)
    if place.size > 1:
        found = [finding.Finding(**one) for one in ranks.examine(timeout)]
        if not found and place.rank > 0:
            return  # rank 0 reports
    elif workers > 1:
        from paceline.launchers.launch import launch

        results = launch(ranks.examine, num_workers=workers, args=(timeout,), progress=False)
        found = [finding.Finding(**one) for one in results[0]]
    else:
        here = socket.gethostname()
        found = [f.at(here) for f in [network.interfaces(), *host.examine()]]
    for name in (hosts or "").split(","):
        found += _look_at(name.strip(), port) if name.strip() else []
    if as_json:
        typer.echo(json.dumps(_as_json(found), indent=2))
    else:
        _print(found)
    raise typer.Exit(finding.exit_code(found))


def _look_at(name: str, port: int) -> list[Finding]:
    """What can be seen of another host from here."""
    from paceline.doctor import network
    from paceline.launchers.endpoint import parse_endpoint

    if ":" in name:
        name, port = parse_endpoint(name)
    address, said = network.resolve(name)
    if address is None:
        return [said.at(name)]
    way = network.route(address)
    found = [said, way] if way.status == "problem" else [said, way, network.port(address, port)]
    return [f.at(name) for f in found]


def _as_json(found: list[Finding]) -> dict[str, Any]:
    from paceline.doctor import finding, link

    links: dict[str, list[Finding]] = {}
    for one in found:
        if " -> " in one.where:
            links.setdefault(one.where, []).append(one)
    return {
        "status": finding.worst(found),
        "findings": [one.to_json() for one in found],
        "links": [{"link": where, **link.figures(those)} for where, those in links.items()],
        "fixes": _fixes(found),
    }


def _fixes(found: list[Finding]) -> list[str]:
    """Problems first; each fix once."""
    ordered = [f for status in ("problem", "warning") for f in found if f.status == status and f.fix]
    return list(dict.fromkeys(f"{f.where}: {f.fix}" if f.where else f.fix for f in ordered))


def _print(found: list[Finding]) -> None:
    where = None
    places = list(dict.fromkeys(f.where for f in found))
    for one in sorted(found, key=lambda f: places.index(f.where)):
        if one.where != where:
            where = one.where
            typer.secho(where or "job", bold=True)
        text, colour = _MARKS[one.status]
        typer.echo(f"  {typer.style(f'{text:8}', fg=colour)} {one.check}: {one.message}")
    fixes = _fixes(found)
    if not fixes:
        typer.secho("Nothing to fix.", bold=True)
        return
    typer.secho("What to fix:", bold=True)
    for number, fix in enumerate(fixes, 1):
        typer.echo(f"  {number}. {fix}")


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command("doctor", epilog=_EPILOG)(doctor)
