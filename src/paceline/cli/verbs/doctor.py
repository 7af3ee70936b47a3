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
    "To measure between hosts, run it as a job, on each host or under mpirun, srun or torchrun:\n\n"
    "paceline run --nodes 2 --rendezvous HOST:PORT -m paceline doctor\n\n"
    "The exit code is 1 if there is a problem, else 0."
)
_MARKS = {
    "ok": ("ok", "green"),
    "note": ("note", "cyan"),
    "warning": ("warning", "yellow"),
    "problem": ("PROBLEM", "red"),
}


def doctor(
    workers: Annotated[
        int,
        typer.Option(
            "-n",
            "--workers",
            metavar="N",
            help="Also measure latency and bandwidth between N workers on this host, if N is 2 or more.",
        ),
    ] = 1,
    hosts: Annotated[
        str | None,
        typer.Option(
            metavar="A,B:PORT,…",
            help="Check other hosts from here: name, route and port; for example a,b:29400.",
        ),
    ] = None,
    port: Annotated[
        int, typer.Option(metavar="PORT", help="Port to check on --hosts that are given without one.")
    ] = 29400,
    timeout: Annotated[
        float, typer.Option(metavar="SECONDS", help="Time to wait for the other ranks of the job.")
    ] = 30.0,
    clean: Annotated[
        str | None,
        typer.Option(
            metavar="FOLDER",
            help="Check nothing; delete what interrupted saves left in this checkpoint folder. No job may be"
            " saving there.",
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of text.")] = False,
) -> None:
    """Check whether this host and the network between hosts are fit for training.

    Checks versions, the C++ core, shared memory, file limits, host names, interfaces and cores; as a job
    also routes, ports, clocks, latency and bandwidth between hosts. Ends with what to fix.
    """
    if clean is not None:
        _clean(clean, as_json=as_json)
        return
    from paceline.errors import ConfigError
    from paceline.launchers.endpoint import parse_endpoint

    if workers < 1 or timeout <= 0 or not 0 < port < 65536:
        raise ConfigError(
            "doctor: --workers >= 1, --timeout > 0 and a --port below 65536 expected,"
            f" got {workers}, {timeout:g} and {port}"
        )
    names = [name.strip() for name in (hosts or "").split(",") if name.strip()]
    others = [parse_endpoint(name) if ":" in name else (name, port) for name in names]

    from paceline.comm.rendezvous.environment import who_am_i
    from paceline.doctor import finding, host, network, ranks

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
    for name, other_port in others:
        found += _check_host(name, other_port)
    if as_json:
        typer.echo(json.dumps(_as_json(found), indent=2))
    else:
        _print(found)
    raise typer.Exit(finding.exit_code(found))


def _clean(folder: str, *, as_json: bool) -> None:
    from paceline.errors import CheckpointError

    if not os.path.isdir(folder):
        raise CheckpointError(f"checkpoint {folder}: a folder expected; there is none (in {os.getcwd()})")
    from paceline.train.saving import checkpoint

    removed = checkpoint.clean(folder)
    if as_json:
        typer.echo(json.dumps({"removed": removed}))
    else:
        typer.echo("\n".join([*(f"removed {name}" for name in removed), f"{len(removed)} files removed"]))


def _check_host(name: str, port: int) -> list[Finding]:
    """Findings about another host, as seen from here."""
    from paceline.doctor import network

    address, resolved = network.resolve(name)
    if address is None:
        return [resolved.at(name)]
    route = network.route(address)
    found = [resolved, route]
    if route.status != "problem":
        found.append(network.port(address, port))
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
    """What to do: for problems first, each fix once."""
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
    """Add `paceline doctor` to the command line."""
    app.command("doctor", epilog=_EPILOG)(doctor)
