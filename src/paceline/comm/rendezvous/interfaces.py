"""This host's network interfaces and addresses, and the local address of a route."""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct
from pathlib import Path

from paceline.user_input import shortened

_SIOCGIFADDR = 0x8915  # Linux: get the address of an interface
_IPV6_ADDRESSES = Path("/proc/net/if_inet6")  # Linux: address, index, length of prefix, scope, flags, name
_LINK_LOCAL = "20"  # a scope: such an address says nothing without the interface


def addresses_of(interface: str) -> list[str]:
    """The addresses of `interface`: IPv4 first; no IPv6 addresses of the link alone; [] without interface."""
    ipv4 = _ipv4_address_of(interface)
    rows = [row.split() for row in text_or_empty(_IPV6_ADDRESSES).splitlines()]
    mine = [row[0] for row in rows if row[5] == interface and row[3] != _LINK_LOCAL]
    return [*([ipv4] if ipv4 else []), *(str(ipaddress.IPv6Address(bytes.fromhex(text))) for text in mine)]


def address_of(interface: str) -> str | None:
    """The first of its addresses; None if there is no such interface or it has none."""
    return next(iter(addresses_of(interface)), None)


def _ipv4_address_of(interface: str) -> str | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        request = struct.pack("256s", interface.encode()[:15])
        try:
            reply = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
        except OSError:
            return None
    return socket.inet_ntoa(reply[20:24])


def text_or_empty(path: Path) -> str:
    """What a file of the kernel says; "" where there is none."""
    return path.read_text() if path.exists() else ""


def interface_of(address: str) -> str | None:
    """The name of the interface that has the IP `address`; None if no interface has it."""
    wanted = str(ipaddress.ip_address(address))
    return next((name for _, name in socket.if_nameindex() if wanted in addresses_of(name)), None)


def chosen(wanted: str) -> list[str]:
    """The names and addresses of this host that a list chooses, in its order; as NCCL reads its own.

    Args:
        wanted: `eth0,10.0.0.1` are names and addresses; a name that no interface has stands for all that
            begin with it. `=eth0,eth1`: exactly these. `^docker,virbr`: all interfaces with an
            address, but loopback and those whose names begin so; `^=eth1`: but exactly this one.

    Raises:
        ValueError: An entry stands for nothing that this host has.
    """
    excludes, text = wanted.startswith("^"), wanted.removeprefix("^")
    is_exact, text = text.startswith("="), text.removeprefix("=")
    parts = [part.strip() for part in text.split(",")]
    names = [name for _, name in socket.if_nameindex()]
    if excludes:
        left_out = [name for name in names if any(_fits(name, part, is_exact=is_exact) for part in parts)]
        found = [name for name in names if name not in left_out and _leads_out(name)]
        if not found or not all(parts):
            raise ValueError(f"{shortened(wanted)} leaves no interface; there are {', '.join(names)}")
        return found
    found = []
    for part in parts:
        mine = [part] if part in names or _is_own(part) else []
        if not mine and not is_exact:
            mine = [name for name in names if part and name.startswith(part) and address_of(name)]
        if not mine:
            raise ValueError(
                f"this host has no interface or address {shortened(part)}; its interfaces: {', '.join(names)}"
            )
        found += [name for name in mine if name not in found]
    return found


def _fits(name: str, part: str, *, is_exact: bool) -> bool:
    return name == part if is_exact else bool(part) and name.startswith(part)


def _leads_out(name: str) -> bool:
    address = address_of(name)
    return address is not None and not ipaddress.ip_address(address).is_loopback


def _is_own(text: str) -> bool:
    """Whether it is an address of this host."""
    try:
        address = ipaddress.ip_address(text)
        return not address.is_unspecified and is_local(str(address))
    except (ValueError, OSError):
        return False


def is_local(address: str) -> bool:
    """Whether `address` belongs to this host, which is so exactly when a socket can be bound to it."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        try:
            probe.bind((address, 0))
        except OSError:
            return False
    return True


def own_addresses() -> list[str]:
    """All addresses of this host: IPv4 first, loopback last."""
    found = [ipaddress.ip_address(a) for _, name in socket.if_nameindex() for a in addresses_of(name)]
    return [str(a) for a in sorted(found, key=lambda a: (a.is_loopback, a.version))] or ["127.0.0.1"]


def local_address_towards(host: str, port: int) -> str:
    """The local address from which packets to `host` (name or address) leave; nothing is sent.

    Raises OSError if the name cannot be resolved or there is no route.
    """
    family, kind, protocol, _, target = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(target)  # a datagram socket: this only chooses a route
        return str(probe.getsockname()[0])


def listening_address(host: str) -> str:
    """The address at which to listen so that others reach this host as `host`.

    Names often lead to a loopback address on the host itself, and to another one elsewhere: then all.
    """
    try:
        address = str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError:
        return _every_address()
    is_name_of_loopback = ipaddress.ip_address(address).is_loopback and host not in (address, "localhost")
    return _every_address() if is_name_of_loopback else address


def _every_address() -> str:
    """What a listener is bound to for all addresses: those of IPv4, unless others come by IPv6 only."""
    return "::" if ":" in own_addresses()[0] else "0.0.0.0"
