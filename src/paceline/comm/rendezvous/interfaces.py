"""This host's network interfaces and IPv4 addresses, and the local address of a route."""

from __future__ import annotations

import fcntl
import ipaddress
import socket
import struct

_SIOCGIFADDR = 0x8915  # Linux: get the address of an interface


def address_of(interface: str) -> str | None:
    """The IPv4 address of `interface`; None if there is no such interface or it has no IPv4 address."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        request = struct.pack("256s", interface.encode()[:15])
        try:
            reply = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, request)
        except OSError:
            return None
    return socket.inet_ntoa(reply[20:24])


def interface_of(address: str) -> str | None:
    """The name of the interface that has the IPv4 `address`; None if no interface has it."""
    return next((name for _, name in socket.if_nameindex() if address_of(name) == address), None)


def own_addresses() -> list[str]:
    """All IPv4 addresses of this host, loopback last."""
    found = [address for _, name in socket.if_nameindex() if (address := address_of(name)) is not None]
    return sorted(found, key=lambda a: a.startswith("127.")) or ["127.0.0.1"]


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
        return "0.0.0.0"
    is_name_of_loopback = ipaddress.ip_address(address).is_loopback and host not in (address, "localhost")
    return "0.0.0.0" if is_name_of_loopback else address
