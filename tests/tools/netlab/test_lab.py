"""The lab is what it says: addresses, separation, rate, delay, and nothing left behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from netlab import Lab, why_not

pytestmark = [
    pytest.mark.net,
    pytest.mark.skipif(bool(why_not()), reason=why_not() or ""),
    pytest.mark.xdist_group("processes"),
]

ECHO = """
import socket, sys
family = socket.AF_INET6 if ":" in sys.argv[1] else socket.AF_INET
with socket.create_server((sys.argv[1], 7000), family=family) as server:
    print("up", flush=True)
    peer, _ = server.accept()
    received = 0
    while data := peer.recv(1 << 20):
        if data == b"ping":
            peer.sendall(b"pong")
        received += len(data)
    print(received, flush=True)
"""
ROUND_TRIP = """
import socket, sys, time
with socket.create_connection((sys.argv[1], 7000), timeout=20) as s:
    times = []
    for _ in range(5):
        start = time.perf_counter()
        s.sendall(b"ping"); assert s.recv(4) == b"pong"
        times.append(time.perf_counter() - start)
    print(min(times))
"""
STREAM = """
import socket, sys, time
with socket.create_connection((sys.argv[1], 7000), timeout=20) as s:
    start = time.perf_counter()
    for _ in range(64):
        s.sendall(bytes(1 << 18))
    s.shutdown(socket.SHUT_WR); s.recv(1)
    print((64 << 18) * 8 / (time.perf_counter() - start))
"""


def talk(lab: Lab, address: str, client: str) -> float:
    server = lab.popen(1, [sys.executable, "-c", ECHO, address], stdout=subprocess.PIPE)
    assert server.stdout is not None
    assert server.stdout.readline().strip() == b"up"
    return float(lab.run(0, [sys.executable, "-c", client, address], timeout_s=60))


def test_hosts_reach_each_other_and_share_no_memory() -> None:
    with Lab(hosts=2, rails=2) as lab:
        for address in (lab.address(1), lab.address(1, rail=1), lab.address6(1)):
            assert talk(lab, address, ROUND_TRIP) < 1.0
        lab.run(0, ["touch", "/dev/shm/mark"])
        assert lab.run(0, ["ls", "/dev/shm"]).split() == ["mark"]
        assert lab.run(1, ["ls", "/dev/shm"]).split() == []
        assert lab.run(1, ["hostname"]).strip() == "host1"
        assert sorted(lab.run(0, ["ls", "/sys/class/net"]).split()) == ["eth0", "eth1", "lo"]


def test_rate_is_kept() -> None:
    with Lab(hosts=2, rate="100mbit") as lab:
        assert 80e6 < talk(lab, lab.address(1), STREAM) < 105e6
        lab.set_rate(1, "50mbit")
        assert 35e6 < talk(lab, lab.address(1), STREAM) < 55e6


def test_delay_is_kept() -> None:
    with Lab(hosts=2, rate="1gbit", delay_s=0.005) as lab:
        assert talk(lab, lab.address(1), ROUND_TRIP) >= 0.010
        assert 50e6 < talk(lab, lab.address(1), STREAM) < 1.05e9


def test_a_pulled_cable_is_silent() -> None:
    with Lab(hosts=2) as lab:
        lab.set_link(1, up=False)
        with pytest.raises(subprocess.TimeoutExpired):
            lab.run(0, ["bash", "-c", f"echo x > /dev/tcp/{lab.address(1)}/7000"], timeout_s=1.0)
        lab.set_link(1, up=True)
        assert talk(lab, lab.address(1), ROUND_TRIP) < 1.0


def gone(pids: list[int]) -> bool:
    for _ in range(200):
        if not any(Path(f"/proc/{pid}/ns/net").exists() and alive(pid) for pid in pids):
            return True
        time.sleep(0.02)
    return False


def alive(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def test_nothing_is_left_after_a_failure() -> None:
    with pytest.raises(KeyError), Lab(hosts=2) as lab:
        # A grandchild in its own session, as a launcher's workers are.
        shell = lab.popen(0, ["bash", "-c", "setsid sleep 1000 & sleep 1000"])
        time.sleep(0.3)
        pids = [shell.pid, *lab._processes()]
        assert len(pids) >= 5
        raise KeyError
    assert gone(pids)


def test_nothing_is_left_when_the_test_runner_is_killed() -> None:
    code = """
        import sys, time
        from netlab import Lab
        with Lab(hosts=2, delay_s=0.001) as lab:
            lab.popen(0, ["sleep", "1000"])
            time.sleep(0.3)
            print(*lab._processes(), *(c.pid for c in lab._children), flush=True)
            time.sleep(1000)
    """
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    runner = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, env=environment
    )
    assert runner.stdout is not None
    pids = [int(p) for p in runner.stdout.readline().split()]
    assert len(pids) >= 4
    runner.send_signal(signal.SIGKILL)
    runner.wait(timeout=10)
    runner.stdout.close()
    assert gone(pids)
