"""Which sockets a job listens on, read from /proc; and strangers who connect to them."""

from __future__ import annotations

import contextlib
import datetime
import importlib
import ipaddress
import itertools
import os
import re
import socket
import struct
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

_LISTEN = "0A"
_NOBODY = 65534
_MOST_FAILURES = 20


class Listener(NamedTuple):
    """A listening socket of some process."""

    pid: int
    address: str
    port: int


def processes_below(pid: int) -> set[int]:
    """`pid` and all processes that it started."""
    parents = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            text = (folder / "stat").read_text()
            parents[int(folder.name)] = int(text[text.rindex(")") + 2 :].split()[1])
    found = {pid}
    while new := {p for p, parent in parents.items() if parent in found} - found:
        found |= new
    return found


def tcp_listeners(pids: set[int]) -> list[Listener]:
    """The TCP listeners of these processes."""
    owners: dict[str, int] = {}
    for pid in pids:
        with contextlib.suppress(OSError):
            for entry in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    if found := re.fullmatch(r"socket:\[(\d+)\]", os.readlink(entry)):
                        owners[found[1]] = pid
    return [
        Listener(owners[inode], address, port) for address, port, inode in _listening() if inode in owners
    ]


def _listening() -> list[tuple[str, int, str]]:
    found = []
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == _LISTEN:
                host, port = fields[1].split(":")
                packed = b"".join(struct.pack("<I", int(host[i : i + 8], 16)) for i in range(0, len(host), 8))
                found.append((str(ipaddress.ip_address(packed)), int(port, 16), fields[9]))
    return found


def is_private(listener: Listener) -> bool:
    """Whether only processes of this host reach it."""
    return ipaddress.ip_address(listener.address).is_loopback


def annoy(address: str, port: int, kept: list[socket.socket], number: int) -> bool:
    """One stranger of a flood: idle, garbage, half a handshake, an oversized frame, an echo, or gone at once.

    Returns whether it was connected.

    One in four of those that are still connected sends another byte, so that its deadline might be put off.
    """
    payloads = (b"", os.urandom(300), b"PACELN\x01\x00" + b"\0" * 20, b"\xff" * 4096, "echo", None)
    payload = payloads[number % len(payloads)]
    with contextlib.suppress(OSError):
        sock = socket.create_connection((address, port), timeout=0.5)
        if payload is None:
            sock.close()
            return True
        sock.setblocking(False)
        kept.append(sock)
        for one in kept[number % 4 :: 40]:
            with contextlib.suppress(OSError):
                one.send(_told(one) if payload == "echo" else b"\0")
        with contextlib.suppress(OSError):
            sock.send(_told(sock) if isinstance(payload, str) else payload)
        if len(kept) > 400:
            kept.pop(0).close()
        return True
    return False


def _told(sock: socket.socket) -> bytes:
    """What the listener has said on this connection so far: sent back, it is a handshake of its own."""
    try:
        return sock.recv(65536)
    except OSError:
        return b""


def reachable_keys(listeners: list[Listener]) -> int:
    """In how many of the listeners torch's client can write a key, and read it again."""
    from torch.distributed import TCPStore

    count = 0
    for x in listeners:
        with contextlib.suppress(Exception):
            store = TCPStore(x.address, x.port, is_master=False, timeout=datetime.timedelta(seconds=2))
            store.set("stranger", "was here")
            count += store.get("stranger") == b"was here"
    return count


def _own_listener() -> tuple[str, int]:
    """One in this process that refuses all connections."""
    server = socket.create_server(("127.0.0.1", 0))

    def refuse() -> None:
        while True:
            server.accept()[0].close()

    threading.Thread(target=refuse, daemon=True).start()
    return server.getsockname()


def flood(places: list[tuple[str, int] | None], seconds: float = 0.0) -> None:
    """A thousand strangers at each, and more until `seconds` are over; None: a listener of this process.

    They are of another account if this one may become another.
    """
    importlib.import_module("encodings.idna")  # sockets need it, and that account may not read it
    if os.getuid() == 0:
        os.setgid(_NOBODY)
        os.setuid(_NOBODY)
    kept: list[socket.socket] = []
    reached = [place or _own_listener() for place in places]
    end = time.monotonic() + seconds
    failures = dict.fromkeys(reached, 0)
    numbers = itertools.count()
    for number in itertools.takewhile(lambda n: n < 1000 or time.monotonic() < end, numbers):
        for address, port in reached:
            if failures[address, port] < _MOST_FAILURES:  # a server of Spark's takes one at a time
                is_in = annoy(address, port, kept, number)
                failures[address, port] = 0 if is_in else failures[address, port] + 1


def main() -> None:
    """`list`, `attack ADDRESS PORT…` or `flood SECONDS PLACE…`.

    The ports of this network namespace; a thousand strangers from here, and in how many ports they reach
    keys; the strangers alone, at places ADDRESS:PORT, or `own` for a listener in this process.
    """
    what, *arguments = sys.argv[1:]
    if what == "list":
        print(" ".join(sorted({str(port) for address, port, _ in _listening() if address != "127.0.0.1"})))
    elif what == "flood":
        split = [argument.rpartition(":") for argument in arguments[1:]]
        flood([(a, int(port)) if a else None for a, _, port in split], float(arguments[0]))
    else:
        address, *ports = arguments
        importlib.import_module("torch.distributed")  # which the other account may not read
        flood([(address, int(port)) for port in ports])
        print(f"reached {reachable_keys([Listener(0, address, int(port)) for port in ports])}")


if __name__ == "__main__":
    main()
