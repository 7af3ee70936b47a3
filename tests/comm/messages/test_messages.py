"""What every fabric promises about messages; the same bodies run on each."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from paceline.comm import current
from paceline.comm.messages.mailbox import Mailbox
from paceline.comm.messages.reply import Deferred
from paceline.comm.simulated.simulate import simulate
from paceline.errors import CommError, ConfigError
from paceline.types import Message

pytestmark = pytest.mark.contract

Body = Callable[[Any], Any]


class Directory(dict):
    def publish(self, rank: int, address: str) -> None:
        self[rank] = address

    def lookup(self, rank: int) -> str | None:
        return self.get(rank)


class SocketComm:
    """The part of a Communicator that these tests need, over real sockets, ranks as threads."""

    def __init__(
        self, rank: int, size: int, directory: Directory, barrier: threading.Barrier, least_shared_bytes: int
    ) -> None:
        self.rank, self.size, self._barrier = rank, size, barrier
        self.mailbox = Mailbox(
            rank=rank,
            size=size,
            secret=b"s" * 32,
            directory=directory,
            timeout_s=20,
            outbox_bytes=1 << 16,
            least_shared_bytes=least_shared_bytes,
        )
        self.serve, self.call, self.post = self.mailbox.serve, self.mailbox.call, self.mailbox.post

    def deferred(self) -> Deferred:
        return Deferred()

    def drain(self) -> None:
        for _ in range(2):
            self.mailbox.flush()
            self._barrier.wait(20)
        self.mailbox.raise_stored()


def run_on_sockets(body: Body, size: int, least_shared_bytes: int = 1 << 40) -> list[Any]:
    directory, barrier = Directory(), threading.Barrier(size)
    comms = [SocketComm(r, size, directory, barrier, least_shared_bytes) for r in range(size)]
    results: list[Any] = [None] * size

    def run(rank: int) -> None:
        try:
            results[rank] = body(comms[rank])
        except BaseException as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(r,)) for r in range(size)]
    try:
        for t in threads:
            t.start()
        for t in threads:
            t.join(60)
            assert not t.is_alive(), "a rank hangs"
    finally:
        for comm in comms:
            comm.mailbox.close()
    for result in results:
        if isinstance(result, BaseException):
            raise result
    return results


def run_simulated(body: Body, size: int) -> list[Any]:
    return list(simulate(lambda: body(current.provided()), num_workers=size))


def run_on_shared_memory(body: Body, size: int) -> list[Any]:
    """Tensors of any size through shared memory, as soon as ranks know that they are near."""
    return run_on_sockets(body, size, least_shared_bytes=0)


@pytest.fixture(params=["sockets", "shared memory", "simulated"])
def run(request: pytest.FixtureRequest) -> Callable[[Body, int], list[Any]]:
    runs = {"sockets": run_on_sockets, "shared memory": run_on_shared_memory, "simulated": run_simulated}
    return runs[request.param]


def test_call_returns_the_answer_from_every_peer_and_from_oneself(run: Any) -> None:
    def body(comm: Any) -> list[float]:
        comm.serve("double", lambda src, m: Message({"src": src}, [t * 2 for t in m.tensors]))
        answers = [
            comm.call(p, "double", Message({}, [torch.full((3,), float(p))])) for p in range(comm.size)
        ]
        got = [a.wait(20) for a in answers]
        assert [m.header["src"] for m in got] == [comm.rank] * comm.size
        comm.drain()
        return [m.tensors[0][0].item() for m in got]

    assert run(body, 3) == [[0.0, 2.0, 4.0]] * 3


@pytest.mark.parametrize(
    "tensor",
    [
        torch.arange(6, dtype=torch.float64).view(2, 3),
        torch.tensor(3.5),
        torch.empty(0, 4),
        torch.tensor([True, False]),
        torch.arange(5, dtype=torch.bfloat16),
        torch.tensor([1 + 2j]),
        torch.arange(12.0).view(3, 4).t(),
    ],
    ids=lambda t: f"{t.dtype}-{tuple(t.shape)}",
)
def test_tensors_and_headers_arrive_unchanged(run: Any, tensor: torch.Tensor) -> None:
    header = {"i": -(1 << 60), "f": 0.1, "s": "päce\n", "b": True}

    def body(comm: Any) -> None:
        comm.serve("echo", lambda src, m: m)
        answer = comm.call(1 - comm.rank, "echo", Message(header, [tensor, tensor])).wait(20)
        assert dict(answer.header) == header
        for t in answer.tensors:
            assert t.dtype == tensor.dtype and t.shape == tensor.shape and torch.equal(t, tensor)
        comm.drain()

    run(body, 2)


def test_posts_arrive_in_order_and_drain_waits_for_all(run: Any) -> None:
    def body(comm: Any) -> list[tuple[int, int]]:
        seen: list[tuple[int, int]] = []
        comm.serve("count", lambda src, m: seen.append((src, m.header["n"])))
        for n in range(200):
            comm.post((comm.rank + 1) % comm.size, "count", Message({"n": n}, [torch.zeros(500)]))
        comm.drain()
        return seen

    for rank, seen in enumerate(run(body, 3)):
        assert seen == [((rank - 1) % 3, n) for n in range(200)]


def test_sender_may_write_its_tensor_after_post(run: Any) -> None:
    def body(comm: Any) -> list[float]:
        seen: list[float] = []
        comm.serve("value", lambda src, m: seen.append(m.tensors[0].sum().item()))
        buffer = torch.zeros(1000)
        for n in range(20):
            buffer.fill_(n)
            comm.post(1 - comm.rank, "value", Message({}, [buffer]))
        buffer.fill_(-1)
        comm.drain()
        return seen

    assert run(body, 2) == [[1000.0 * n for n in range(20)]] * 2


def test_message_to_a_channel_that_is_served_later(run: Any) -> None:
    def body(comm: Any) -> int:
        if comm.rank == 0:
            reply = comm.call(1, "late", Message({"n": 7}))
        else:
            comm.serve("other", lambda src, m: None)
            comm.serve("late", lambda src, m: Message({"n": m.header["n"] + 1}))
            return 8
        return int(reply.wait(20).header["n"])

    assert run(body, 2) == [8, 8]


def test_deferred_reply_is_answered_by_a_later_message(run: Any) -> None:
    def body(comm: Any) -> int:
        waiting: list[Any] = []

        def handler(src: int, message: Message) -> Any:
            if message.header["kind"] == "release":
                waiting.pop().set(Message({"n": 5}))
                return None
            waiting.append(comm.deferred())
            return waiting[-1]

        comm.serve("gate", handler)
        if comm.rank == 0:
            reply = comm.call(1, "gate", Message({"kind": "wait"}))
            comm.call(1, "gate", Message({"kind": "release"})).wait(20)
            n = int(reply.wait(20).header["n"])
        else:
            n = 5
        comm.drain()
        return n

    assert run(body, 2) == [5, 5]


def test_handler_error_travels_back_and_the_next_call_works(run: Any) -> None:
    def body(comm: Any) -> None:
        def handler(src: int, message: Message) -> Message:
            if message.header["fail"]:
                raise ValueError("cannot do that")
            return Message()

        comm.serve("maybe", handler)
        peer = (comm.rank + 1) % comm.size
        with pytest.raises(CommError, match=rf"rank {peer}.*maybe.*cannot do that"):
            comm.call(peer, "maybe", Message({"fail": True})).wait(20)
        comm.call(peer, "maybe", Message({"fail": False})).wait(20)
        comm.drain()

    run(body, 2)
    run(body, 1)


def test_error_in_a_posted_message_is_raised_where_it_happened(run: Any) -> None:
    def body(comm: Any) -> str:
        def handler(src: int, message: Message) -> None:
            raise ValueError("broken")

        comm.serve("bad", handler)
        if comm.rank == 0:
            comm.post(1, "bad", Message())
        try:
            comm.drain()
        except CommError as error:
            return str(error)
        return ""

    results = run(body, 2)
    assert results[0] == "" and "broken" in results[1] and "rank 1" in results[1]


@pytest.mark.parametrize(
    ("header", "tensors"),
    [
        ({"x": [1]}, []),
        ({1: 2}, []),
        ({"x": None}, []),
        ({}, [torch.eye(3).to_sparse()]),
    ],
)
def test_messages_that_cannot_travel_are_refused(run: Any, header: Any, tensors: Any) -> None:
    def body(comm: Any) -> None:
        with pytest.raises(ConfigError):
            comm.post(0, "x", Message(header, tensors))
        with pytest.raises(ConfigError, match="rank 9"):
            comm.post(9, "x", Message())

    run(body, 1)
