"""HOST:PORT where the launchers of several hosts meet, and this host's address towards it."""

from __future__ import annotations

import ipaddress
import socket

from paceline.comm.rendezvous.interfaces import local_address_towards
from paceline.errors import ConfigError
from paceline.user_input import digits, shortened

DEFAULT_PORT = 29400


def parse_endpoint(text: str) -> tuple[str, int]:
    """Split `host`, `host:port` or `[v6]:port`; the port defaults to 29400."""
    host, port = text, str(DEFAULT_PORT)
    if text.startswith("["):
        host, _, after = text[1:].partition("]")
        port = after[1:] if after.startswith(":") else port
    elif text.count(":") == 1:
        host, port = text.split(":")
    number = digits(port)
    if not host or number is None or not 0 < number < 65536:
        raise ConfigError(f"rendezvous {shortened(text)}: HOST:PORT with a port from 1 to 65535 expected")
    return host, number


def resolve(host: str) -> str:
    """The IP address of `host`; ConfigError if it has none."""
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        pass
    try:
        return str(socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        raise ConfigError(
            f"rendezvous host {host!r} cannot be resolved ({error.strerror or error}); give its IP address"
        ) from None


def address_towards(peer: str, port: int) -> str:
    """The address of this host's interface that leads to `peer`; ConfigError if there is no route."""
    try:
        return local_address_towards(peer, port)
    except OSError as error:
        raise ConfigError(
            f"no route from this host to the rendezvous at {peer}: {error.strerror or error}"
        ) from None
