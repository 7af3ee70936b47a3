"""Measurements between two ranks: latency, bandwidth, difference of clocks.

Each rank runs a `LinkResponder`; one rank measures, the other's responder answers. Both first prove that they
know the job's secret. The system chooses the ports, as for the fabrics, so that a firewall
between ranks shows up here.
"""

from __future__ import annotations

import contextlib
import socket
import statistics
import struct
import time
from typing import Any

from paceline.comm.security.authentication import Acceptor, Initiator, authenticate
from paceline.comm.security.keys import derive
from paceline.comm.security.receive import receive_exactly
from paceline.comm.security.threaded_listener import ThreadedListener
from paceline.doctor.finding import NOTE, OK, PROBLEM, WARNING, Finding
from paceline.errors import ProtocolError

_PINGS = 60
_CHUNK_BYTES = 1 << 18
_STREAM_S = 1.0
_STREAM_BYTES = 256 << 20
_SKEW_S = 1.0
_SLOW_BYTES_PER_S = 12.5e6
_LONG_S = 0.005
_PURPOSE = "doctor"
_PATIENCE_S = 20.0
_TIME = struct.Struct("!d")
# Requests of one byte. A stream is followed by its size in bytes.
_GET_TIME, _PING, _STREAM, _DONE = b"t", b"p", b"s", b"q"


class LinkResponder:
    """Answers measurements on a port of its own until closed.

    Args:
        secret: The job's secret.
        address: The local address to listen on.
    """

    def __init__(self, secret: bytes, address: str) -> None:
        key = derive(secret, _PURPOSE)
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._listener = ThreadedListener(
            socket.create_server((address, 0), family=family, backlog=64),
            "doctor",
            guard=lambda: Acceptor(key, rank=0, size=1),
            serve=_answer,
        )
        self.port = self._listener.port

    def close(self) -> None:
        """Stop answering and close the port."""
        self._listener.close()


def _answer(peer: socket.socket, _: Acceptor) -> None:
    peer.settimeout(_PATIENCE_S)
    with contextlib.suppress(OSError):
        _answer_requests(peer)


def _answer_requests(peer: socket.socket) -> None:
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    while True:
        request = peer.recv(1)
        if request == _GET_TIME:
            peer.sendall(_TIME.pack(time.time()))
        elif request == _PING:
            peer.sendall(_DONE)
        elif request == _STREAM:
            (size,) = struct.unpack("!Q", receive_exactly(peer, 8))
            left = size
            while left:
                data = peer.recv(min(left, _CHUNK_BYTES))
                if not data:
                    return
                left -= len(data)
            peer.sendall(_DONE)
        else:
            return


def measure(address: str, port: int, secret: bytes, *, timeout_s: float = 5.0) -> list[Finding]:
    """Connect to the responder at `address`; findings about its clock, the latency and the bandwidth."""
    try:
        peer = socket.create_connection((address, port), timeout=timeout_s)
    except OSError as error:
        is_silent = isinstance(error, TimeoutError)
        reason = f"no answer within {timeout_s:g} s" if is_silent else str(error.strerror or error)
        return [
            Finding(
                "connection",
                PROBLEM,
                f"no connection to {address} port {port}, where a rank listens: {reason}",
                "check for a firewall between the hosts: ranks use ports that the system chooses, so allow"
                " all TCP between the hosts of a job",
                values={"address": address, "port": port},
            )
        ]
    with peer:
        peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        try:
            guard = Initiator(derive(secret, _PURPOSE), rank=0, peer=0)
            authenticate(peer, guard, timeout_s=_PATIENCE_S)
            peer.settimeout(_PATIENCE_S)
            return [_clock(peer), _latency(peer), _bandwidth(peer)]
        except (OSError, ProtocolError) as error:
            text = f"the connection to {address} port {port} broke during the measurement: {error}"
            return [
                Finding(
                    "connection",
                    PROBLEM,
                    text,
                    "check whether the other host is overloaded or the link is unstable",
                )
            ]


def _clock(peer: socket.socket) -> Finding:
    best = (float("inf"), 0.0)
    for _ in range(9):
        before = time.time()
        peer.sendall(_GET_TIME)
        (there,) = _TIME.unpack(receive_exactly(peer, _TIME.size))
        after = time.time()
        best = min(best, (after - before, there - (before + after) / 2))
    return judge_clock(best[1], best[0] / 2)


def judge_clock(skew_s: float, uncertainty_s: float) -> Finding:
    """The finding for a difference of two clocks."""
    values = {"skew_s": skew_s, "uncertainty_s": uncertainty_s}
    text = f"the clocks differ by {abs(skew_s) * 1e3:.1f} ms (± {uncertainty_s * 1e3:.1f})"
    if abs(skew_s) - uncertainty_s > _SKEW_S:
        text += "; training works, but times in logs and checkpoints are wrong, and certificates may fail"
        return Finding(
            "clocks", WARNING, text, "start chrony or systemd-timesyncd on both hosts", values=values
        )
    return Finding("clocks", OK, text, values=values)


def _latency(peer: socket.socket) -> Finding:
    times = []
    for _ in range(_PINGS):
        began = time.perf_counter()
        peer.sendall(_PING)
        receive_exactly(peer, 1)
        times.append(time.perf_counter() - began)
    one_way_s = statistics.median(times[_PINGS // 6 :]) / 2
    worst_s = max(times[_PINGS // 6 :]) / 2
    values = {"latency_s": one_way_s, "worst_latency_s": worst_s}
    text = f"latency {_microseconds(one_way_s)} one way (worst {_microseconds(worst_s)})"
    if one_way_s > _LONG_S:
        text += ": a strategy that synchronises in every step waits for this several times per step"
        fix = "use a strategy that communicates rarely, such as local_sgd(period=16) or diloco"
        return Finding("latency", WARNING, text, fix, values=values)
    return Finding("latency", OK, text, values=values)


def _bandwidth(peer: socket.socket) -> Finding:
    payload = bytes(_CHUNK_BYTES)
    size, rate = _CHUNK_BYTES, 0.0
    began_all = time.perf_counter()
    # Grow until one transfer takes a quarter of a second: enough to fill a fast link, and no burden on a slow
    # one.
    while time.perf_counter() - began_all < _STREAM_S and size <= _STREAM_BYTES:
        began = time.perf_counter()
        peer.sendall(_STREAM + struct.pack("!Q", size))
        for _ in range(size // _CHUNK_BYTES):
            peer.sendall(payload)
        receive_exactly(peer, 1)
        took_s = time.perf_counter() - began
        rate = size / took_s
        if took_s > _STREAM_S / 4:
            break
        size *= 4
    values = {"bytes_per_s": rate}
    text = f"bandwidth {rate / 1e6:.0f} MB/s ({rate * 8 / 1e9:.2f} Gbit/s) on one connection"
    if rate < _SLOW_BYTES_PER_S:
        text += f": a model of 100 MB takes {1e8 / rate:.0f} s to send"
        fix = "send fewer bytes (codec=…, local_sgd, diloco; see `paceline strategies`); or a faster network"
        return Finding("bandwidth", WARNING, text, fix, values=values)
    return Finding("bandwidth", NOTE if rate < 1e8 else OK, text, values=values)


def _microseconds(seconds: float) -> str:
    return f"{seconds * 1e6:.0f} µs" if seconds < 1e-3 else f"{seconds * 1e3:.1f} ms"


def figures(findings: list[Finding]) -> dict[str, Any]:
    """The figures of one link: {"latency_s": …, "bytes_per_s": …, "skew_s": …}."""
    return {
        k: v for f in findings for k, v in f.values.items() if k in ("latency_s", "bytes_per_s", "skew_s")
    }
