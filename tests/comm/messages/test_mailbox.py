"""The sockets behind messages: strangers get nowhere, a dead peer is named, a full outbox waits."""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import tempfile
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from paceline.comm.messages import framing
from paceline.comm.messages.mailbox import Mailbox
from paceline.comm.messages.shared_blocks import LEAST_BYTES, Borrower, Lender
from paceline.comm.security import strangers
from paceline.comm.security.authentication import Acceptor, Initiator
from paceline.errors import CommError, ConfigError, PeerLost, ProtocolError, Timeout
from paceline.types import Message

SECRET = b"k" * 32


class Directory(dict):
    def publish(self, rank: int, address: str) -> None:
        self[rank] = address

    def lookup(self, rank: int) -> str | None:
        return self.get(rank)


@pytest.fixture
def pair() -> Iterator[tuple[Mailbox, Mailbox]]:
    directory = Directory()
    boxes = [
        Mailbox(rank=r, size=2, secret=SECRET, directory=directory, timeout_s=5, outbox_bytes=100_000)
        for r in range(2)
    ]
    yield boxes[0], boxes[1]
    for box in boxes:
        box.close(timeout_s=1)
    assert not [t for t in threading.enumerate() if t.name.startswith("paceline-messages")]


def connect(box: Mailbox) -> socket.socket:
    host, port = box.address.split()
    return socket.create_connection((host, int(port)), timeout=5)


def shake_hands(a: Initiator, b: Acceptor) -> None:
    challenge = b.feed(a.start())
    b.feed(a.feed(challenge))
    assert a.is_done and b.is_done


def test_handshake_succeeds_only_with_the_same_secret_and_ranks() -> None:
    shake_hands(Initiator(SECRET, rank=3, peer=5), Acceptor(SECRET, rank=5, size=8))
    with pytest.raises(ProtocolError, match="secret"):
        shake_hands(Initiator(b"x" * 32, rank=3, peer=5), Acceptor(SECRET, rank=5, size=8))
    with pytest.raises(ProtocolError):
        shake_hands(Initiator(SECRET, rank=3, peer=4), Acceptor(SECRET, rank=5, size=8))
    with pytest.raises(ProtocolError):
        shake_hands(Initiator(SECRET, rank=9, peer=5), Acceptor(SECRET, rank=5, size=8))


def test_handshake_proof_cannot_be_reflected_or_replayed() -> None:
    initiator, acceptor = Initiator(SECRET, rank=0, peer=1), Acceptor(SECRET, rank=1, size=2)
    challenge = acceptor.feed(initiator.start())
    with pytest.raises(ProtocolError):
        acceptor.feed(challenge[32:])  # its own proof sent back
    proof = initiator.feed(challenge)
    again = Acceptor(SECRET, rank=1, size=2)
    again.feed(initiator.start())
    with pytest.raises(ProtocolError):
        again.feed(proof)  # recorded from another connection


def test_strangers_and_garbage_disturb_nothing(pair: tuple[Mailbox, Mailbox]) -> None:
    pair[1].serve("n", lambda src, m: Message({"n": m.header["n"]}))
    idle = [connect(pair[1]) for _ in range(20)]
    for i in range(200):
        with connect(pair[1]) as s:
            s.settimeout(5)
            s.sendall(os.urandom(48 + i))
            try:
                assert s.recv(100) == b""
            except ConnectionError:
                pass
        assert pair[0].call(1, "n", Message({"n": i})).wait(5).header["n"] == i
    for s in idle:
        s.close()


def test_number_of_strangers_is_limited(pair: tuple[Mailbox, Mailbox]) -> None:
    sockets = [connect(pair[1]) for _ in range(strangers.MOST + 30)]
    time.sleep(0.2)
    assert len(pair[1]._service._listener.strangers) <= strangers.MOST + 2
    pair[1].serve("x", lambda src, m: None)
    pair[0].call(1, "x", Message()).wait(5)  # while they all stay
    for s in sockets:
        s.close()


def test_a_rank_whose_handshake_was_dropped_connects_again(pair: tuple[Mailbox, Mailbox]) -> None:
    """As when strangers push it out: its first two connections end before their handshake does."""
    real = pair[1].address.split(" ")
    with socket.create_server(("127.0.0.1", 0)) as relay:
        pair[0]._service._directory.publish(1, f"127.0.0.1 {relay.getsockname()[1]} elsewhere")
        pair[1].serve("x", lambda src, m: None)
        answer = pair[0].call(1, "x", Message())
        for _ in range(2):
            relay.settimeout(10)
            relay.accept()[0].close()
        pair[0]._service._directory.publish(1, f"{real[0]} {real[1]} elsewhere")
        answer.wait(20)


def test_authenticated_peer_with_a_monstrous_frame_is_cut_off(pair: tuple[Mailbox, Mailbox]) -> None:
    lost: list[int] = []
    pair[1].on_lost(lost.append)
    s = connect(pair[1])
    initiator = Initiator(SECRET, rank=0, peer=1)
    s.sendall(initiator.start())
    s.sendall(initiator.feed(s.recv(64, socket.MSG_WAITALL)))
    s.sendall(framing.PREFIX.pack(framing.FrameKind.POST, 20, 0, 1 << 60) + b" " * 20)
    with contextlib.suppress(ConnectionError):
        assert s.recv(1) == b""
    s.close()
    deadline = time.monotonic() + 5
    while not lost and time.monotonic() < deadline:
        time.sleep(0.01)
    assert lost == [0]


def test_peer_that_vanishes_fails_waiting_calls_and_is_named(pair: tuple[Mailbox, Mailbox]) -> None:
    pair[1].serve("never", lambda src, m: pair_deferred())
    reply = pair[0].call(1, "never", Message())
    pair[0].call(1, "never", Message())
    with pytest.raises(Timeout, match="rank 1"):
        reply.wait(0.3)
    cut(pair[1])
    with pytest.raises(PeerLost, match="rank 1"):
        reply.wait(5)
    with pytest.raises(PeerLost, match="rank 1"):
        pair[0].post(1, "never", Message())


def cut(box: Mailbox) -> None:
    """Break the connections that others opened to `box`."""
    incoming = box._outboxes._incoming
    box._service.run(lambda: [c.sock.shutdown(socket.SHUT_RDWR) for c in incoming.values()])


def test_a_callback_that_fails_ends_neither_the_service_nor_other_callbacks(
    pair: tuple[Mailbox, Mailbox],
) -> None:
    lost = threading.Event()
    pair[0].on_lost(lambda peer: [][peer])
    pair[0].on_lost(lambda peer: lost.set())
    pair[1].serve("echo", lambda src, m: m)
    pair[0].call(1, "echo", Message()).wait(5)
    cut(pair[1])
    assert lost.wait(5)
    with pytest.raises(CommError, match="callback failed when rank 1 was lost: IndexError"):
        pair[0].flush(5)
        pair[0].raise_stored()
    pair[0].serve("echo", lambda src, m: m)
    pair[0].call(0, "echo", Message()).wait(5)


def test_after_giving_up_a_callback_that_wants_to_send_is_no_error(pair: tuple[Mailbox, Mailbox]) -> None:
    lost = threading.Event()

    def ask(peer: int) -> None:
        lost.set()
        raise CommError("this communicator cannot be used")

    pair[0].on_lost(lambda peer: pair[0].give_up("rank 1 is lost"))
    pair[0].on_lost(ask)
    pair[1].serve("echo", lambda src, m: m)
    pair[0].call(1, "echo", Message()).wait(5)
    cut(pair[1])
    assert lost.wait(5)
    pair[0].flush(5)
    pair[0].raise_stored()


def test_nobody_waits_for_a_service_that_has_failed(pair: tuple[Mailbox, Mailbox]) -> None:
    pair[1].serve("never", lambda src, m: pair_deferred())
    pair[1].serve("echo", lambda src, m: m)
    pair[0].call(1, "echo", Message()).wait(5)
    waiting = pair[0].call(1, "never", Message())
    pair[0].call(1, "echo", Message()).then(lambda outcome: {}["asked"])
    with pytest.raises(CommError, match="service failed: KeyError"):
        waiting.wait(5)
    with pytest.raises(CommError, match="service failed: KeyError"):
        pair[0].post(1, "echo", Message())


def pair_deferred() -> object:
    from paceline.comm.messages.reply import Deferred

    return Deferred()


def test_full_outbox_makes_the_poster_wait_then_time_out(pair: tuple[Mailbox, Mailbox]) -> None:
    gate = threading.Event()
    pair[1].serve("slow", lambda src, m: (gate.wait(30), None)[1])
    pair[0]._outboxes.timeout_s = 0.5
    payload = torch.zeros(1 << 20, dtype=torch.uint8)
    with pytest.raises(Timeout, match="outbox to rank 1 stayed full"):
        for _ in range(200):
            pair[0].post(1, "slow", Message({}, [payload]))
    gate.set()


def test_close_sends_what_is_queued(pair: tuple[Mailbox, Mailbox]) -> None:
    seen: list[int] = []
    pair[1].serve("n", lambda src, m: seen.append(m.header["n"]))
    for n in range(50):
        pair[0].post(1, "n", Message({"n": n}, [torch.zeros(1000)]))
    pair[0].close()
    deadline = time.monotonic() + 5
    while len(seen) < 50 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert seen == list(range(50))
    with pytest.raises(CommError, match="closed"):
        pair[0].post(1, "n", Message())


def test_goodbye_is_not_a_loss(pair: tuple[Mailbox, Mailbox]) -> None:
    lost: list[int] = []
    pair[1].on_lost(lost.append)
    pair[1].serve("x", lambda src, m: None)
    pair[0].call(1, "x", Message()).wait(5)
    pair[0].close()
    pair[1].flush()
    assert lost == []


@pytest.mark.parametrize(
    ("header", "payload"),
    [
        (b"{", 0),
        (b"[]", 0),
        (b'{"c": 1, "h": {}, "t": []}', 0),
        (b'{"c": "x", "h": {"a": [1]}, "t": []}', 0),
        (b'{"c": "x", "h": {}, "t": [["float32", [2]]]}', 4),
        (b'{"c": "x", "h": {}, "t": [["float32", [-1]]]}', 0),
        (b'{"c": "x", "h": {}, "t": [["object", [1]]]}', 8),
        (b'{"c": "x", "h": {}, "t": [["float32", [true]]]}', 4),
        (b'{"c": "x", "h": {}, "t": 3}', 0),
        (b"[" * 100_000, 0),
        (b"\xff\xfe", 0),
    ],
)
def test_headers_that_are_not_ours_are_refused(header: bytes, payload: int) -> None:
    with pytest.raises(ProtocolError):
        framing.parse_header(header, payload)


def test_prefix_lengths_are_limited() -> None:
    for kind, header, payload in [(0, 0, 0), (99, 0, 0), (1, 1 << 30, 0), (1, 2, 1 << 50)]:
        with pytest.raises(ProtocolError):
            framing.parse_prefix(struct.pack("<B3xIQQ", kind, header, 1, payload), max_payload_bytes=1 << 35)


def test_short_secret_is_refused() -> None:
    with pytest.raises(ConfigError, match="secret"):
        Mailbox(rank=0, size=1, secret=b"short", directory=Directory())


def test_large_tensors_within_a_host_stay_off_the_socket(pair: tuple[Mailbox, Mailbox]) -> None:
    frames: list[int] = []
    pair[1].serve("echo", lambda src, m: m)
    pair[0].call(1, "echo", Message()).wait(5)  # now they know that they are near
    add_request = pair[0]._outboxes.add_request

    def spy(peer: int, frame: list[memoryview], block: int | None, *, may_wait: bool) -> bool:
        frames.append(sum(len(b) for b in frame))
        return add_request(peer, frame, block, may_wait=may_wait)

    pair[0]._outboxes.add_request = spy  # type: ignore[method-assign]
    sent = [torch.arange(300_000, dtype=torch.float32), torch.ones(3, dtype=torch.bool), torch.tensor(2.5)]
    for _ in range(20):  # blocks are used again
        answer = pair[0].call(1, "echo", Message({"n": 1}, sent)).wait(5)
        assert all(
            torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(answer.tensors, sent, strict=True)
        )
    assert len(frames) == 20 and max(frames) < 1000
    pair[0].flush()
    assert len(pair[0]._lender._blocks) <= 2 and not pair[0]._lender.is_lending()


def test_blocks_of_a_dead_peer_are_free_again(pair: tuple[Mailbox, Mailbox]) -> None:
    release = threading.Event()
    pair[1].serve("slow", lambda src, m: (release.wait(10), None)[1])
    pair[0]._service.near.add(1)
    reply = pair[0].call(1, "slow", Message({}, [torch.zeros(1 << 20)]))
    pair[0].declare_lost(1, "the test says so")
    with pytest.raises(PeerLost):
        reply.wait(5)
    assert not pair[0]._lender.is_lending()
    release.set()


@pytest.mark.parametrize(
    "block", [[1], "x", [1, 2, 3], [-1, 0], [True, 0], [1 << 40, 3], [os.getpid(), 1 << 20]]
)
def test_nonsense_about_shared_blocks_is_refused(block: object) -> None:
    with pytest.raises(ProtocolError):
        Borrower().read(block, [memoryview(bytearray(8))])


def test_only_sealed_memory_of_the_right_size_is_read() -> None:
    target = memoryview(bytearray(100))
    with tempfile.TemporaryFile() as file:
        file.truncate(1 << 20)
        with pytest.raises(ProtocolError):
            Borrower().read([os.getpid(), file.fileno()], [target])
    loose = os.memfd_create("loose")
    try:
        os.ftruncate(loose, 1 << 20)
        with pytest.raises(ProtocolError, match="change its size"):
            Borrower().read([os.getpid(), loose], [target])
    finally:
        os.close(loose)
    lender = Lender()
    fd = lender.lend(0, [torch.full((100,), 7, dtype=torch.uint8)])
    Borrower().read([os.getpid(), fd], [target])
    assert bytes(target) == b"\x07" * 100
    with pytest.raises(ProtocolError, match="in a shared block of"):
        Borrower().read([os.getpid(), fd], [memoryview(bytearray(LEAST_BYTES + 1))])
    lender.close()


def test_a_full_pool_falls_back_to_the_socket() -> None:
    lender = Lender(pool_bytes=2 * LEAST_BYTES)
    lent = [lender.lend(1, [torch.zeros(10)]) for _ in range(3)]
    assert lent[2] is None and lent[0] is not None and lent[1] is not None
    lender.take_back(2, lent[0])  # it is not theirs to give back
    assert lender.lend(1, [torch.zeros(10)]) is None
    lender.take_back(1, lent[0])
    assert lender.lend(1, [torch.zeros(10)]) == lent[0]
    lender.close()
