"""Which sockets a job listens on, read from /proc; and strangers who connect to them."""

from __future__ import annotations

import contextlib
import datetime
import ipaddress
import os
import re
import socket
import struct
import sys
from pathlib import Path
from typing import NamedTuple

_LISTEN = "0A"


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


def annoy(address: str, port: int, kept: list[socket.socket], number: int) -> None:
    """One stranger of a flood: idle, garbage, half a handshake, an oversized frame, or gone at once."""
    payloads = (b"", os.urandom(300), b"PACELN\x01\x00" + b"\0" * 20, b"\xff" * 4096, None)
    payload = payloads[number % len(payloads)]
    with contextlib.suppress(OSError):
        sock = socket.create_connection((address, port), timeout=2)
        if payload is None:
            sock.close()
            return
        sock.setblocking(False)
        with contextlib.suppress(OSError):
            sock.send(payload)
        kept.append(sock)
        if len(kept) > 400:
            kept.pop(0).close()


def main() -> None:
    """`list`: the ports of this network namespace; `attack ADDRESS PORT…`: a thousand strangers from here."""
    what, *arguments = sys.argv[1:]
    if what == "list":
        print(" ".join(sorted({str(port) for address, port, _ in _listening() if address != "127.0.0.1"})))
        return
    address, *ports = arguments
    kept: list[socket.socket] = []
    for port in ports:
        for number in range(1000):
            annoy(address, int(port), kept, number)
    reached = 0
    for port in ports:
        with contextlib.suppress(Exception):
            from torch.distributed import TCPStore

            store = TCPStore(address, int(port), is_master=False, timeout=datetime.timedelta(seconds=2))
            store.set("stranger", "was here")
            reached += 1
    print(f"reached {reached}")


if __name__ == "__main__":
    main()
