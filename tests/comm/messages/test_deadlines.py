"""Nobody waits for ever for a silent or stuck rank, and nobody gives up while all make progress."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from paceline.comm.messages.mailbox import Mailbox
from paceline.comm.messages.open_requests import OpenRequest, OpenRequests
from paceline.comm.messages.reply import Deferred
from paceline.errors import CommError, PeerLost, Timeout
from paceline.types import Message

DEADLINE_S = 4.0


class Addresses:
    def __init__(self) -> None:
        self._found: dict[int, str] = {}

    def publish(self, rank: int, address: str) -> None:
        self._found[rank] = address

    def lookup(self, rank: int) -> str | None:
        return self._found.get(rank)


@pytest.fixture
def boxes() -> Iterator[list[Mailbox]]:
    addresses = Addresses()
    made = [
        Mailbox(rank=r, size=3, secret=b"s" * 16, directory=addresses, timeout_s=DEADLINE_S) for r in range(3)
    ]
    yield made
    for box in made:
        box.close(0.2)
    assert not [t for t in threading.enumerate() if t.name.startswith("paceline-messages")]


def connect(boxes: list[Mailbox]) -> None:
    for box in boxes:
        box.serve("hello", lambda source, message: None)
    for box in boxes:
        for peer in range(3):
            box.call(peer, "hello", Message()).wait(10)


def test_a_call_ends_by_the_deadline_of_the_job(boxes: list[Mailbox]) -> None:
    connect(boxes)
    boxes[1].serve("never", lambda source, message: Deferred())
    began = time.monotonic()
    with pytest.raises(CommError, match=r"got nothing done|nothing for 4 s"):
        boxes[0].call(1, "never", Message()).wait()
    assert time.monotonic() - began < 4 * DEADLINE_S


def test_a_silent_peer_is_lost(boxes: list[Mailbox]) -> None:
    """Its service does nothing any more, as in a stopped process or behind a cut cable."""
    connect(boxes)
    lost: list[int] = []
    boxes[0].on_lost(lost.append)
    has_stopped, may_go_on = threading.Event(), threading.Event()

    def stop(source: int, message: Message) -> None:
        has_stopped.set()
        may_go_on.wait()

    boxes[1].serve("stop", stop)
    boxes[2].post(1, "stop", Message())
    assert has_stopped.wait(10)
    with pytest.raises((PeerLost, Timeout)):
        boxes[0].call(1, "hello", Message()).wait()
    deadline = time.monotonic() + DEADLINE_S
    while lost != [1] and time.monotonic() < deadline:
        time.sleep(0.05)
    may_go_on.set()
    assert lost == [1]


def test_a_quiet_peer_that_lives_is_not_lost(boxes: list[Mailbox]) -> None:
    connect(boxes)
    time.sleep(1.5 * DEADLINE_S)
    boxes[0].call(1, "hello", Message()).wait(5)
    assert not boxes[0].why_lost(1)


def test_a_late_answer_is_waited_for_while_all_get_on(boxes: list[Mailbox]) -> None:
    connect(boxes)
    answer = Deferred()
    boxes[1].serve("late", lambda source, message: answer)
    reply = boxes[0].call(1, "late", Message())
    end = time.monotonic() + 1.5 * DEADLINE_S
    while time.monotonic() < end:  # rank 2 is slow, and not stuck; so is rank 1
        boxes[2].progress += 1
        boxes[1].progress += 1
        time.sleep(0.2)
    answer.set(Message({"n": 1}))
    assert reply.wait().header["n"] == 1


def test_a_rank_that_lives_and_does_nothing_is_given_up(boxes: list[Mailbox]) -> None:
    """As a server with `--min-workers` does: the others go on."""
    connect(boxes)
    lost: list[int] = []
    answer = Deferred()
    boxes[0].on_lost(lambda rank: (lost.append(rank), answer.set(Message())))
    boxes[0].gives_up_stuck_ranks = True
    boxes[0].serve("together", lambda source, message: answer)
    replies = [boxes[1].call(0, "together", Message()), boxes[0].call(0, "together", Message())]
    for reply in replies:
        reply.wait()
    assert lost == [2] and "got nothing done" in boxes[0].why_lost(2)


def test_the_rank_at_fault_is_named(boxes: list[Mailbox]) -> None:
    connect(boxes)
    boxes[0].serve("together", lambda source, message: Deferred())
    replies = [boxes[1].call(0, "together", Message()), boxes[0].call(0, "together", Message())]
    for reply in replies:
        with pytest.raises(CommError, match=r"rank 2 got nothing done"):
            reply.wait()


def test_progress_is_what_changes() -> None:
    now = [0.0]
    requests = OpenRequests(3, 8.0, clock=lambda: now[0])
    requests.add(OpenRequest(0, 1, "x"))
    now[0] = 3.0
    assert requests.late() == [OpenRequest(0, 1, "x")] and requests.stuck() == []
    requests.note_progress(1, 5)
    now[0] = 10.0
    requests.note_progress(1, 5)
    assert requests.stuck() == [2]
    now[0] = 12.0
    assert requests.stuck() == [1, 2]
    requests.note_progress(2)
    assert requests.stuck() == [1]
    requests.discard(OpenRequest(0, 1, "x"))
    assert requests.late() == [] and requests.stuck() == [0, 1]
