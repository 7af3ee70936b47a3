"""A client of Hydra, the process manager of MPICH and Intel MPI: its line protocol, PMI version 1.

It does two things for scripts that do not use MPI: ranks on several hosts learn where rank 0 is, and when one
rank fails, Hydra is asked to end the others.
Source: Balaji et al., PMI: a scalable parallel process-management interface for extreme-scale systems, 2010.
"""

from __future__ import annotations

import atexit
import dataclasses
import os
import re
import socket
import stat
import sys
import time
from collections.abc import Mapping
from types import TracebackType

from paceline.comm.rendezvous.environment import ProcessIdentity
from paceline.comm.rendezvous.interfaces import own_addresses
from paceline.errors import CommError
from paceline.user_input import digits

_CONNECT_S = 1.0
_FORWARD_S = 0.5
"""Time for Hydra to forward this rank's last output before the job ends."""
_hook_is_set = False
_manager: ProcessManager | None = None


class ProcessManager:
    """The key-value store of one job, as Hydra keeps it for the ranks."""

    def __init__(self, descriptor: int) -> None:
        self._descriptor = descriptor
        self._ask("init pmi_version=1 pmi_subversion=1")
        self._name = self._ask("get_my_kvsname")["kvsname"]
        self._count = 0
        atexit.register(self._finish)

    def publish(self, value: str | None) -> str:
        """Return the value of the one rank that gives one. Collective; values have no blanks."""
        self._count += 1
        key = f"paceline-{self._count}"
        if value is not None:
            self._ask(f"put kvsname={self._name} key={key} value={value}")
        self._ask("barrier_in")
        return self._ask(f"get kvsname={self._name} key={key}")["value"]

    def _ask(self, command: str) -> dict[str, str]:
        verb = command.split()[0]
        os.write(self._descriptor, f"cmd={command}\n".encode())
        answer = b""
        while not answer.endswith(b"\n"):
            byte = os.read(self._descriptor, 1)
            if not byte:
                raise CommError(f"the process manager closed its connection when asked to {verb}")
            answer += byte
        found = dict(re.findall(r"(\w+)=(\S+)", answer.decode()))
        if found.get("rc", "0") != "0":
            raise CommError(f"the process manager refused to {verb}: {answer.decode().strip()}")
        return found

    def _finish(self) -> None:
        # Intel's manager takes a process that ends without `finalize` for one that crashed.
        if getattr(sys, "last_value", None) is None:
            try:
                self._ask("finalize")
            except (OSError, CommError):
                pass


def agree_on_master(
    identity: ProcessIdentity, environment: Mapping[str, str], timeout_s: float
) -> ProcessIdentity:
    """Add rank 0's address and a free port of its host to `identity`; collective.

    Without a process manager it stays as it is. Raises CommError when rank 0 cannot be reached at any of its
    addresses.
    """
    global _manager  # noqa: PLW0603  one conversation per process
    descriptor = _descriptor(environment)
    if descriptor is None:
        return identity
    _manager = _manager or ProcessManager(descriptor)
    if identity.rank == 0:
        addresses, port = own_addresses(), _free_port()
        _manager.publish(f"{','.join(addresses)}:{port}")
        return dataclasses.replace(identity, master_address=addresses[0], master_port=port)
    text, _, number = _manager.publish(None).rpartition(":")
    address = _reachable(text.split(","), int(number), timeout_s)
    return dataclasses.replace(identity, master_address=address, master_port=int(number))


def abort_on_exception(environment: Mapping[str, str]) -> None:
    """After an uncaught exception, ask Hydra to end the whole job with exit code 1."""
    global _hook_is_set  # noqa: PLW0603
    if _descriptor(environment) is None or _hook_is_set:
        return
    _hook_is_set = True
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        before(kind, error, trace)
        abort(environment)

    sys.excepthook = hook


def abort(environment: Mapping[str, str]) -> None:
    """Ask Hydra, if it started this process, to end the whole job with exit code 1."""
    descriptor = _descriptor(environment)
    if descriptor is None:
        return
    sys.stderr.flush()
    time.sleep(_FORWARD_S)  # Hydra drops output that it has not forwarded when the job ends
    try:
        os.write(descriptor, b"cmd=abort exitcode=1\n")
    except OSError:
        pass  # the process manager has ended, and will take this process with it


def _descriptor(environment: Mapping[str, str]) -> int | None:
    """The open socket to the process manager, if this process has one."""
    text = environment.get("PMI_FD", "")
    descriptor = digits(text)
    if descriptor is None:
        return None
    try:
        is_socket = stat.S_ISSOCK(os.fstat(descriptor).st_mode)
    except (OSError, OverflowError):
        return None
    return descriptor if is_socket else None


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def _reachable(addresses: list[str], port: int, timeout_s: float) -> str:
    """The first address that accepts connections; rank 0 may need a moment before it listens."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        for address in addresses:
            try:
                socket.create_connection((address, port), timeout=_CONNECT_S).close()
                return address
            except OSError:
                continue
        time.sleep(0.05)
    raise CommError(
        f"rank 0 listens at none of {', '.join(addresses)}, port {port}, after {timeout_s:g} s: a firewall?"
        " Export MASTER_ADDR and MASTER_PORT to say where to meet"
    )
