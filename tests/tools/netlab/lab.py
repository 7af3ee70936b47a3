"""A laboratory of hosts: Linux namespaces joined by links of known rate and delay.

    with Lab(hosts=2, rate="1gbit") as lab:
        workers = [lab.popen(i, [sys.executable, "worker.py"], env={"RANK": str(i)}) for i in range(2)]

Host i has the addresses `lab.address(i)` (10.77.0.i+1) and fd77::i+1 on eth0, a host name, and a /dev/shm of
its own, so two hosts cannot meet in shared memory by accident. Further rails are eth1 … in 10.77.1.0/24 ….

A namespace lives as long as a process in it. Each host is held by one sleeping process that dies with the
thread that made the lab; on exit every process found in the lab's network namespaces is killed. So nothing
outlives the lab, even when the test runner itself is killed.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

SWITCH_SOURCE = Path(__file__).with_name("delay_switch.c")
UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}


@cache
def why_not() -> str | None:
    """Why no lab can be made here, or None."""
    if sys.platform != "linux":
        return "the network lab needs Linux"
    if os.geteuid() != 0:
        return "the network lab needs root"
    missing = [tool for tool in ("ip", "tc", "unshare", "nsenter", "setpriv") if not shutil.which(tool)]
    if missing:
        return f"the network lab needs {', '.join(missing)}"
    probe = ["unshare", "--net", "--uts", "--ipc", "--mount", "ip", "link", "add", "br0", "type", "bridge"]
    done = subprocess.run(probe, check=False, capture_output=True, text=True, timeout=20)
    return f"no network namespaces here: {done.stderr.strip()}" if done.returncode else None


def bits_per_s(rate: str) -> float:
    """'1gbit' -> 1e9."""
    for unit, factor in UNITS.items():
        if rate.endswith(unit):
            return float(rate.removesuffix(unit)) * factor
    raise ValueError(f"rate {rate!r}: expected a number with {', '.join(UNITS)}")


class Lab:
    """`hosts` namespaces on one switch, or on `rails` of them.

    rate: speed of every link in both directions ("100mbit", "1gbit"); None leaves them unshaped (~30 Gbit/s).
    delay_s: one-way propagation delay. A delayed lab has one rail and no IPv6 (a userspace switch of TUN
    devices carries it, because the kernel here need not have netem).
    """

    def __init__(
        self, *, hosts: int = 2, rate: str | None = None, delay_s: float = 0.0, rails: int = 1
    ) -> None:
        if delay_s and rails != 1:
            raise ValueError("a delayed lab has one rail")
        self.num_hosts, self.rate, self.delay_s, self.rails = hosts, rate, delay_s, rails
        self._holders: list[subprocess.Popen[bytes]] = []
        self._children: list[subprocess.Popen[Any]] = []
        self._network_namespaces: set[int] = set()

    def __enter__(self) -> Lab:
        try:
            for i in range(self.num_hosts):
                self._holders.append(self._hold(f"host{i}"))
            if self.delay_s:
                self._start_delay_switch()
            else:
                self._holders.append(self._hold("switch"))
                for rail in range(self.rails):
                    self._join_by_bridge(rail)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def address(self, host: int, rail: int = 0) -> str:
        """The IPv4 address of a host on a rail."""
        return f"10.77.{rail}.{host + 1}"

    def address6(self, host: int, rail: int = 0) -> str:
        """The IPv6 address of a host on a rail."""
        return f"fd77:{rail}::{host + 1}"

    def popen(
        self, host: int, argv: Sequence[str], *, env: Mapping[str, str] | None = None, **options: Any
    ) -> subprocess.Popen[Any]:
        """Start a process on a host; its pid is the process's own. `env` is added to this environment."""
        child = subprocess.Popen(
            [*self._enter(self._holders[host]), *argv], env={**os.environ, **(env or {})}, **options
        )
        self._children.append(child)
        return child

    def run(self, host: int, argv: Sequence[str], *, timeout_s: float = 60.0) -> str:
        """Run a command on a host to its end and return what it printed; raises with its errors."""
        child = self.popen(host, argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        try:
            out, err = child.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            child.kill()
            child.communicate()
            raise
        if child.returncode:
            raise RuntimeError(f"host {host}: {' '.join(argv)}: exit {child.returncode}: {err.strip()}")
        return str(out)

    def set_rate(self, host: int, rate: str | None, *, rail: int = 0) -> None:
        """Change the speed of one host's link, both directions."""
        if self.delay_s:
            raise ValueError("the rate of a delayed lab is fixed when it is made")
        for holder, device in ((self._holders[host], f"eth{rail}"), (self._holders[-1], f"p{rail}-{host}")):
            if rate is None:
                self._in(holder, f"tc qdisc del dev {device} root", check=False)
                continue
            # A burst of one millisecond: more would flatter small messages, less starves the timer.
            burst = max(16_000, int(bits_per_s(rate) / 8 / 1000))
            self._in(holder, f"tc qdisc replace dev {device} root tbf rate {rate} burst {burst} latency 50ms")

    def set_link(self, host: int, *, up: bool, rail: int = 0) -> None:
        """Pull or plug a host's cable: packets vanish, nobody is told."""
        if self.delay_s:
            self._in(self._holders[host], f"ip link set eth{rail} {'up' if up else 'down'}")
        else:
            self._in(
                self._holders[-1],
                f"ip link set p{rail}-{host} {'master br' + str(rail) if up else 'nomaster'}",
            )

    def close(self) -> None:
        """Kill every process in the lab; the namespaces go with them."""
        for _ in range(50):
            pids = self._processes()
            for pid in pids:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:
                    pass
            if not pids:
                break
            for child in [*self._children, *self._holders]:
                child.poll()
            time.sleep(0.01)
        for child in [*self._children, *self._holders]:
            child.kill()
            child.wait(timeout=10)
            for stream in (child.stdin, child.stdout, child.stderr):
                if stream:
                    stream.close()
        self._children.clear()
        self._holders.clear()

    def _processes(self) -> list[int]:
        """Live processes in the lab's network namespaces (not zombies: those have none)."""
        found = []
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                try:
                    inode = (entry / "ns/net").stat().st_ino
                except OSError:
                    continue
                if inode in self._network_namespaces:
                    found.append(int(entry.name))
        return found

    def _hold(self, name: str) -> subprocess.Popen[bytes]:
        setup = (
            f"hostname {name} && mount -t tmpfs tmpfs /dev/shm && ip link set lo up"
            " && (mount -t sysfs sysfs /sys 2>/dev/null || true) && echo up && exec sleep infinity"
        )
        argv = ["setpriv", "--pdeathsig", "KILL", "--"]
        argv += ["unshare", "--net", "--uts", "--ipc", "--mount", "--", "sh", "-c", setup]
        holder = subprocess.Popen(argv, stdout=subprocess.PIPE)
        assert holder.stdout is not None
        if holder.stdout.readline().strip() != b"up":
            holder.kill()
            holder.wait(timeout=10)
            raise RuntimeError(f"lab: {name} did not come up")
        self._network_namespaces.add(Path(f"/proc/{holder.pid}/ns/net").stat().st_ino)
        return holder

    def _enter(self, holder: subprocess.Popen[bytes]) -> list[str]:
        enter = ["nsenter", "-t", str(holder.pid), "--net", "--uts", "--ipc", "--mount"]
        return [*enter, f"--wdns={Path.cwd()}", "--", "setpriv", "--pdeathsig", "KILL", "--"]

    def _in(self, holder: subprocess.Popen[bytes], command: str, *, check: bool = True) -> None:
        done = subprocess.run(
            [*self._enter(holder), *command.split()], check=False, capture_output=True, text=True, timeout=20
        )
        if check and done.returncode:
            raise RuntimeError(f"lab: {command}: {done.stderr.strip()}")

    def _join_by_bridge(self, rail: int) -> None:
        switch = self._holders[-1]
        self._in(switch, f"ip link add br{rail} type bridge stp_state 0 forward_delay 0 mcast_snooping 0")
        self._in(switch, f"ip link set br{rail} up")
        for i in range(self.num_hosts):
            host, port = self._holders[i], f"p{rail}-{i}"
            self._in(host, f"ip link add eth{rail} type veth peer name {port} netns {switch.pid}")
            self._in(switch, f"ip link set {port} master br{rail} up")
            self._in(host, f"ip addr add {self.address(i, rail)}/24 dev eth{rail}")
            self._in(host, f"ip addr add {self.address6(i, rail)}/64 dev eth{rail} nodad")
            self._in(host, f"ip link set eth{rail} up")
            if self.rate:
                self.set_rate(i, self.rate, rail=rail)

    def _start_delay_switch(self) -> None:
        for i in range(self.num_hosts):
            holder = self._holders[i]
            self._in(holder, "ip tuntap add dev eth0 mode tun")
            # Large packets keep the switch's cost per byte low; it has no checksum or segment offload.
            self._in(holder, "ip link set eth0 mtu 60000 txqueuelen 1000 up")
            self._in(holder, f"ip addr add {self.address(i)}/24 dev eth0")
        rate = bits_per_s(self.rate) if self.rate else 0.0
        argv = [str(delay_switch()), str(round(self.delay_s * 1e9)), str(round(rate / 8))]
        switch = subprocess.Popen(
            ["setpriv", "--pdeathsig", "KILL", "--", *argv, *(str(h.pid) for h in self._holders)],
            stdout=subprocess.PIPE,
        )
        self._children.append(switch)
        assert switch.stdout is not None
        if switch.stdout.readline().strip() != b"up":
            raise RuntimeError("lab: the delay switch did not start")


@cache
def delay_switch() -> Path:
    """The compiled userspace switch, kept in build/ and rebuilt when its source is newer."""
    target = Path(__file__).resolve().parents[3] / "build" / "netlab" / "delay_switch"
    if not target.exists() or target.stat().st_mtime < SWITCH_SOURCE.stat().st_mtime:
        compiler = shutil.which("cc")
        if not compiler:
            raise RuntimeError("a delayed lab needs a C compiler (cc)")
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_suffix(f".{os.getpid()}")
        command = [compiler, "-O2", "-Wall", "-Wextra", "-o", str(partial), str(SWITCH_SOURCE)]
        subprocess.run(command, check=True, timeout=60)
        partial.replace(target)
    return target
