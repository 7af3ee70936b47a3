"""Checks of another host from here, without a process of ours on it: its name, the route, a port."""

from __future__ import annotations

import errno
import ipaddress
import socket
import time
from pathlib import Path
from typing import Any

from paceline.comm.rendezvous.interfaces import address_of, interface_of, local_address_towards
from paceline.doctor.finding import NOTE, OK, PROBLEM, WARNING, Finding

_SLOW_MBIT = 1000


def interfaces() -> Finding:
    """The finding about this host's network interfaces."""
    found = []
    for _, name in socket.if_nameindex():
        folder = Path("/sys/class/net") / name
        state, mtu, speed = (_read(folder / f) for f in ("operstate", "mtu", "speed"))
        found.append(
            {
                "name": name,
                "address": address_of(name),
                "state": state,
                "mtu_bytes": int(mtu) if mtu.isdigit() else None,
                "speed_mbit_per_s": int(speed) if speed.isdigit() else None,
            }
        )
    used = [i for i in found if i["address"]]
    text = ", ".join(
        f"{i['name']} {i['address']}"
        + (f" ({i['speed_mbit_per_s']} Mbit/s)" if i["speed_mbit_per_s"] else "")
        for i in used
    )
    values: dict[str, Any] = {"interfaces": found}
    if all(ipaddress.ip_address(str(i["address"])).is_loopback for i in used):
        fix = "give the host a network (in a container: a bridge or host network)"
        return Finding("interfaces", WARNING, f"only loopback: {text or 'nothing'}", fix, values=values)
    return Finding("interfaces", OK, text, values=values)


def resolve(name: str) -> tuple[str | None, Finding]:
    """The address of `name` (None: it has none), and the finding about it."""
    try:
        return str(ipaddress.ip_address(name)), Finding("name", OK, f"{name} is an address")
    except ValueError:
        pass
    began = time.perf_counter()
    try:
        address = str(socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        fix = f"correct the name, or add `<address> {name}` to /etc/hosts on every host; or use its address"
        return None, Finding("name", PROBLEM, f"{name!r} cannot be resolved: {error.strerror or error}", fix)
    took_s = time.perf_counter() - began
    values = {"address": address, "seconds": took_s}
    if ipaddress.ip_address(address).is_loopback and name not in ("localhost", socket.gethostname()):
        fix = f"give {name} its address on the network in /etc/hosts"
        return address, Finding(
            "name", PROBLEM, f"{name} resolves to {address}, which is this host", fix, values=values
        )
    if took_s > 1.0:
        fix = "check the name servers in /etc/resolv.conf: one does not answer"
        return address, Finding(
            "name", WARNING, f"{name} is {address}; the lookup took {took_s:.1f} s", fix, values=values
        )
    return address, Finding("name", OK, f"{name} is {address}", values=values)


def route(address: str) -> Finding:
    """The finding about the route: which of this host's addresses and interfaces lead to `address`."""
    try:
        own = local_address_towards(address, 9)
    except OSError as error:
        fix = "check `ip route`: this host has no route to that network"
        return Finding("route", PROBLEM, f"no route to {address}: {error.strerror or error}", fix)
    name = interface_of(own) or "?"
    mtu, speed = (_read(Path("/sys/class/net") / name / f) for f in ("mtu", "speed"))
    values = {"own_address": own, "interface": name, "mtu_bytes": int(mtu) if mtu.isdigit() else None}
    text = f"{address} is reached from {own} through {name}" + (f", MTU {mtu}" if mtu else "")
    if speed.isdigit() and int(speed) < _SLOW_MBIT and name != "lo":
        fix = "use a faster interface if there is one; see `ip -s link` and `ethtool`"
        return Finding("route", WARNING, f"{text}, a link of {speed} Mbit/s", fix, values=values)
    return Finding("route", OK, text, values=values)


def port(address: str, number: int, *, timeout_s: float = 3.0) -> Finding:
    """Whether packets reach port `number` of `address`; a refused connection proves that they do."""
    began = time.perf_counter()
    values: dict[str, Any] = {"port": number}
    try:
        socket.create_connection((address, number), timeout=timeout_s).close()
        outcome = "open"
    except ConnectionRefusedError:
        outcome = "closed"
    except OSError as error:
        if isinstance(error, TimeoutError) or error.errno in (errno.ETIMEDOUT, errno.EAGAIN):
            return Finding(
                "port",
                PROBLEM,
                f"no answer from {address} port {number} within {timeout_s:g} s: a firewall drops the"
                " packets, or the host is down",
                f"open the port on {address} (ranks also use ports that the system chooses: allow all TCP"
                " between the hosts of a job)",
                values={**values, "outcome": "silent"},
            )
        return Finding(
            "port",
            PROBLEM,
            f"{address} port {number} cannot be reached: {error.strerror or error}",
            "check `ip route` and the firewall, which may reject connections",
            values={**values, "outcome": "unreachable"},
        )
    round_trip_s = time.perf_counter() - began
    values |= {"outcome": outcome, "round_trip_s": round_trip_s}
    what = "a program listens" if outcome == "open" else "no program listens now, but packets arrive"
    text = f"{address} port {number}: {what}; round trip {round_trip_s * 1e3:.2f} ms"
    return Finding("port", OK if outcome == "open" else NOTE, text, values=values)


def _read(path: Path) -> str:
    try:
        return path.read_text().strip()
    except OSError:
        return ""
