"""Stores: the job's own behind its handshake, and signed values in one that strangers may write."""

from __future__ import annotations

import datetime
import os
import socket
import stat
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch.distributed as dist
from torch._C._distributed_c10d import HashStore, TCPStore

from paceline.comm.rendezvous import store_protocol as protocol
from paceline.comm.rendezvous.environment import ProcessIdentity
from paceline.comm.rendezvous.job_store import JobStore, Prefixed
from paceline.comm.rendezvous.meeting import meet_in_store
from paceline.comm.rendezvous.signed_store import SignedStore
from paceline.comm.rendezvous.store_server import StoreServer
from paceline.comm.security import keys
from paceline.comm.security.authentication import Initiator
from paceline.comm.security.keys import derive
from paceline.comm.security.strangers import MOST, Strangers
from paceline.errors import CommError, ConfigError, ProtocolError

KEY = b"a key that both know"
SECOND = datetime.timedelta(seconds=1)


@pytest.fixture(params=[None, "127.0.0.1"], ids=["unix", "tcp"])
def server(request: pytest.FixtureRequest) -> Iterator[StoreServer]:
    server = StoreServer(KEY, host=request.param)
    yield server
    server.close()


def client(server: StoreServer, seconds: float = 10.0, key: bytes = KEY) -> JobStore:
    return JobStore(server.address, key, datetime.timedelta(seconds=seconds))


def raw(server: StoreServer) -> socket.socket:
    kind, _, where = server.address.partition(":")
    if kind == "unix":
        sock = socket.socket(socket.AF_UNIX)
        sock.connect(where)
        return sock
    host, _, port = where.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=5)


def test_does_what_torchs_store_does(server: StoreServer) -> None:
    ours, torchs = client(server), TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for store in (ours, Prefixed("part", ours), torchs):
        assert store.add("n", 3) == 3 and store.add("n", -1) == 2 and store.get("n") == b"2"
        store.set("a", "1")
        store.set("b", b"\x00\xff")  # type: ignore[arg-type]
        assert store.get("a") == b"1" and store.get("b") == b"\x00\xff"
        assert store.check(["a", "b"]) and not store.check(["a", "zz"])
        assert store.compare_set("c", "", "v") == b"v"
        assert store.compare_set("c", "v", "w") == b"w"
        assert store.compare_set("c", "v", "x") == b"w"
        assert store.compare_set("none", "expected", "x") == b"expected"
        assert store.delete_key("a") and not store.delete_key("a") and store.num_keys() >= 3
        store.append("list", "x")
        store.append("list", "y")
        assert store.multi_get(["list", "c"]) == [b"xy", b"w"]
        store.multi_set(["p", "q"], ["1", "2"])
        assert store.multi_get(["q", "p"]) == [b"2", b"1"]
        store.wait(["p"])
        with pytest.raises(dist.DistStoreError):
            store.wait(["never"], datetime.timedelta(milliseconds=50))


def test_a_waiting_client_gets_what_another_sets(server: StoreServer) -> None:
    first, second = client(server), client(server)
    threading.Timer(0.2, lambda: first.multi_set(["x", "y"], ["1", "2"])).start()
    assert second.multi_get(["x", "y"]) == [b"1", b"2"]


def test_one_client_waits_in_a_thread_and_asks_in_another(server: StoreServer) -> None:
    store = client(server)
    waiting = threading.Thread(target=lambda: store.wait(["late"]))
    waiting.start()
    for n in range(100):
        assert store.add("n", 1) == n + 1
    store.set("late", "")
    waiting.join(5)
    assert not waiting.is_alive()


def test_another_key_is_refused_on_both_sides(server: StoreServer) -> None:
    with pytest.raises(ProtocolError, match="does not know this job's key"):
        client(server, key=b"another key")
    assert server.num_clients == 0


def test_a_silent_impostor_does_not_get_a_request() -> None:
    with socket.create_server(("127.0.0.1", 0)) as impostor:
        port = impostor.getsockname()[1]
        said: list[bytes] = []

        def answer() -> None:
            peer, _ = impostor.accept()
            with peer:
                said.append(peer.recv(1000))
                peer.sendall(b"\0" * 64)
                said.append(peer.recv(1000))

        thread = threading.Thread(target=answer)
        thread.start()
        with pytest.raises(ProtocolError):
            JobStore(f"tcp:127.0.0.1:{port}", KEY, SECOND)
        thread.join(5)
    assert len(said[0]) == 48 and said[1] == b""


@pytest.mark.parametrize(
    "garbage",
    [b"GET / HTTP/1.1\r\n\r\n", os.urandom(5000), b"\0" * 48, Initiator(b"x", rank=0, peer=0).start()],
    ids=["http", "noise", "zeros", "hello"],
)
def test_garbage_changes_nothing(server: StoreServer, garbage: bytes) -> None:
    with raw(server) as sock:
        sock.sendall(garbage)
        assert client(server).add("n", 1) == 1


def test_idle_strangers_neither_block_nor_stay(server: StoreServer) -> None:
    idle = []
    for _ in range(4 * MOST):
        idle.append(raw(server))
    began = time.monotonic()
    store = client(server)
    store.set("a", "1")
    assert store.get("a") == b"1" and time.monotonic() - began < 5
    for sock in idle:
        sock.close()


def test_an_oversized_message_ends_that_connection_only(server: StoreServer) -> None:
    store = client(server)
    sock = raw(server)
    guard = Initiator(derive(KEY, protocol.PURPOSE), rank=0, peer=0)
    sock.sendall(guard.start())
    sock.sendall(guard.feed(sock.recv(64, socket.MSG_WAITALL)))
    sock.sendall(protocol.LENGTH.pack(1 << 31))
    assert sock.recv(10) == b""
    sock.close()
    store.set("a", "1")
    assert store.get("a") == b"1"


def test_a_replayed_handshake_is_refused(server: StoreServer) -> None:
    """What an honest client said once does not open a second connection."""
    guard = Initiator(derive(KEY, protocol.PURPOSE), rank=0, peer=0)
    hello = guard.start()
    with raw(server) as first:
        first.sendall(hello)
        proof = guard.feed(first.recv(64, socket.MSG_WAITALL))
        first.sendall(proof)
        with raw(server) as second:
            second.sendall(hello + proof + protocol.encode(protocol.StoreOperation.LIST, []))
            second.recv(64, socket.MSG_WAITALL)
            try:
                assert second.recv(10) == b""
            except ConnectionResetError:
                pass


def test_the_socket_of_one_host_is_for_its_account_alone() -> None:
    server = StoreServer(KEY)
    folder = Path(server.address.removeprefix("unix:")).parent
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    path = server.address.removeprefix("unix:")
    server.close()
    assert not os.path.exists(path)


def test_the_socket_of_a_killed_process_is_replaced() -> None:
    first = StoreServer(KEY, name="test-killed")
    with pytest.raises(ConfigError, match="another process of this account listens there"):
        StoreServer(KEY, name="test-killed")
    path = first.address.removeprefix("unix:")
    first.close()
    stale = socket.socket(socket.AF_UNIX)
    stale.bind(path)
    stale.close()
    second = StoreServer(KEY, name="test-killed")
    assert client(second).add("n", 1) == 1
    second.close()


def test_the_work_for_strangers_is_bounded() -> None:
    """At first as much as a job's own ranks need, then a twentieth of the thread's time."""
    now = [0.0]
    strangers: Strangers[int] = Strangers("test", clock=lambda: now[0])
    spent = 0.0
    while now[0] < 100.0:
        while strangers.pause_s() == 0.0:
            strangers.charge(1e-3)
            spent += 1e-3
        now[0] += strangers.pause_s() + 1e-9
    assert spent == pytest.approx(0.25 + 0.05 * 100, rel=0.02)
    for number in range(300):
        assert strangers.admit(number) == (None if len(strangers) <= MOST else min(strangers))
        if len(strangers) > MOST:
            strangers.discard(min(strangers))
    now[0] += 11.0
    assert len(strangers.overdue()) == len(strangers) == MOST


def test_a_refused_source_is_reported_once_a_minute(capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    strangers: Strangers[int] = Strangers("rank 3", clock=lambda: now[0])
    for _ in range(50):
        strangers.report("10.0.0.9", "no handshake")
    now[0] = 61.0
    strangers.report("10.0.0.9", "no handshake")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "rank 3: refused a connection from 10.0.0.9" in lines[0]
    assert "49 more" in lines[1]
    for n in range(1000):
        strangers.report(f"10.0.1.{n}", "no handshake")
    assert len(capsys.readouterr().err.splitlines()) < 70


def test_signed_values_are_verified() -> None:
    open_to_all = HashStore()
    store, other = SignedStore(open_to_all, KEY), SignedStore(open_to_all, b"another key")
    store.set("a", "1")
    assert store.get("a") == b"1" and b"1" in open_to_all.get("a")
    with pytest.raises(CommError, match="not written by a process with this job's key"):
        other.get("a")
    open_to_all.set("b", open_to_all.get("a"))  # type: ignore[arg-type]  # torch takes bytes too
    with pytest.raises(CommError):
        store.get("b")  # the signature is of key "a"
    open_to_all.set("a", "forged")
    with pytest.raises(CommError):
        store.get("a")


def test_a_card_that_a_stranger_replaced_is_not_used() -> None:
    """An attacker who recorded an earlier meeting writes its cards into the store again."""
    open_to_all = HashStore()
    store = SignedStore(open_to_all, KEY)
    store.set("card/1", '{"host": "h", "address": "", "contribution": "old"}')
    old = open_to_all.get("card/1")

    class Replaced(SignedStore):
        def set(self, key: str, value: str | bytes) -> None:
            super().set(key, value)
            open_to_all.set("card/1", old)  # type: ignore[arg-type]

    Replaced(open_to_all, KEY).set("card/0", '{"host": "h", "address": "", "contribution": "x"}')
    with pytest.raises(CommError, match="another process has written this rank's entry"):
        meet_in_store(
            Replaced(open_to_all, KEY),
            ProcessIdentity(1, 2, 0, 1, "torchrun"),
            key=KEY,
            host="h",
            address="",
            timeout_s=5,
            advice="",
        )


def test_the_key_of_an_account_is_made_once(tmp_path: Path) -> None:
    environment = {"HOME": str(tmp_path)}
    found: list[bytes] = []
    threads = [
        threading.Thread(target=lambda: found.append(keys.account_key(environment))) for _ in range(16)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 16 and len(set(found)) == 1
    path = tmp_path / ".config" / "paceline" / "key"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [p.name for p in path.parent.iterdir()] == ["key"]


def test_a_key_that_others_can_read_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "secret"
    path.write_text("x" * 32)
    path.chmod(0o644)
    with pytest.raises(ConfigError, match=r"PACELINE_SECRET_FILE .*others can read it"):
        keys.account_key({"PACELINE_SECRET_FILE": str(path)})
    path.chmod(0o600)
    assert keys.account_key({"PACELINE_SECRET_FILE": str(path)}) == b"x" * 32
