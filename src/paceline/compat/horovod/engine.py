"""The background thread: hands named operations to the coordinator and performs them in its order.

Submitting never waits. Rank 0 holds the coordinator; requests and responses travel as messages, so ranks may
submit in different orders. Only this thread touches the communicators of the process sets.

An exception that no request explains ends the engine of every rank: ranks may be at different points of a
collective, and nobody would answer the others. All that is in flight fails with its text.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch

from paceline.compat.horovod.constants import HorovodInternalError
from paceline.compat.horovod.coordinator import Coordinator
from paceline.compat.horovod.membership import Membership
from paceline.compat.horovod.perform import SubmittedOperation, perform, stand_in
from paceline.compat.horovod.request import (
    Request,
    Response,
    pack,
    pack_text,
    unpack_requests,
    unpack_responses,
    unpack_text,
)
from paceline.compat.horovod.timeline import Timeline
from paceline.errors import PacelineError, PeerLost
from paceline.types import Communicator, Message, Rank, Reply

REQUESTS, RESPONSES, FAILED = "horovod/requests", "horovod/responses", "horovod/failed"
_CHECK_STALLS_EVERY_S = 1.0
_TELL_FAILURE_S = 5.0
"""How long a rank that failed waits until the others know why, before it leaves."""


class Handle:
    """A submitted operation: an entry, and whether it is done."""

    def __init__(self, entry: SubmittedOperation) -> None:
        self.entry = entry
        self.error: BaseException | None = None
        self.number = -1
        """join: the rank that joined last. add_process_set: the number of the new set."""
        self.done = threading.Event()

    def finish(self, error: BaseException | None = None) -> None:
        """Mark as done; `error` is raised where the result is asked for."""
        self.error = error
        self.done.set()

    def wait(self) -> None:
        """Block until the operation is done; raise its error, in a copy of its own for every caller."""
        self.done.wait()
        if isinstance(self.error, HorovodInternalError):
            raise HorovodInternalError(str(self.error)) from self.error.__cause__
        if self.error is not None:
            raise self.error


class OperationThread:
    """One per process between `init` and `shutdown`."""

    def __init__(
        self,
        comm: Communicator,
        membership: Membership,
        *,
        timeline: Timeline,
        fusion_bytes: int,
        stall_warning_s: float,
        stall_shutdown_s: float,
    ) -> None:
        self._comm = comm
        self._membership = membership
        self._timeline = timeline
        self._stall_warning_s, self._stall_shutdown_s = stall_warning_s, stall_shutdown_s
        self._changed = threading.Condition()
        self._outgoing: list[Request] = []
        self._incoming: deque[Response] = deque()
        self._in_flight: dict[tuple[int, str], Handle] = {}
        self._failure: BaseException | None = None
        self._is_stopping = False
        self._coordinator = (
            Coordinator(membership.ranks, fusion_bytes=fusion_bytes) if not comm.rank else None
        )
        self._coordination = threading.Lock()
        if self._coordinator is not None:
            comm.serve(REQUESTS, self._take_requests)
        comm.serve(RESPONSES, self._take_responses)
        comm.serve(FAILED, self._take_failure)
        comm.on_lost(self._lose)
        # No rank may post before every rank serves.
        comm.barrier().wait()
        self._thread = threading.Thread(target=self._run, name="paceline-horovod", daemon=True)
        self._thread.start()

    def submit(self, entry: SubmittedOperation) -> Handle:
        """Queue an operation; ValueError if its name is in flight already."""
        handle = Handle(entry)
        key = (entry.request.process_set, entry.request.name)
        with self._changed:
            if self._failure is not None:
                raise HorovodInternalError(
                    f"an earlier operation failed: {self._failure}; hvd.shutdown() and hvd.init() start again"
                ) from self._failure
            if key in self._in_flight:
                raise ValueError(
                    f"Duplicate tensor name {entry.request.name!r}: an operation of that name is still in "
                    "flight on this rank; give each concurrent operation a name of its own"
                )
            self._in_flight[key] = handle
            self._outgoing.append(entry.request)
            self._changed.notify()
        return handle

    def stop(self) -> None:
        """End the thread; operations in flight fail."""
        with self._changed:
            self._is_stopping = True
            self._changed.notify()
        self._thread.join()
        self._timeline.stop()
        self._fail_all(HorovodInternalError("hvd.shutdown() was called while operations were in flight"))

    @property
    def has_failed(self) -> bool:
        """Whether an error ended the engine; its communicators are closed then."""
        return self._failure is not None

    @torch.no_grad()
    def _run(self) -> None:
        try:
            self._work()
        except BaseException as error:
            self._record_failure(error)
        if self._failure is not None:
            # Peers may wait for this rank in a collective: closed connections end that. Each rank passes the
            # reason on before, so that nobody hears of a closed connection first.
            self._tell_failure(self._failure)
            self._membership.close(goodbye=False, whole_job=True)

    def _work(self) -> None:
        next_check_s = self._comm.now() + _CHECK_STALLS_EVERY_S
        while True:
            with self._changed:
                if not (self._outgoing or self._incoming or self._is_stopping or self._failure):
                    self._changed.wait(_CHECK_STALLS_EVERY_S)
                if self._is_stopping or self._failure:
                    return
                requests, self._outgoing = self._outgoing, []
                response = self._incoming.popleft() if self._incoming else None
            if requests or response is not None:
                self._timeline.mark_cycle()
            if requests:
                self._ask(requests)
            if response is not None:
                self._answer(response)
            self._timeline.flush_if_long()
            if self._coordinator is not None and self._comm.now() >= next_check_s:
                next_check_s = self._comm.now() + _CHECK_STALLS_EVERY_S
                self._check_stalls()
                self._timeline.flush()

    def _ask(self, requests: Sequence[Request]) -> None:
        if self._coordinator is None:
            self._comm.post(0, REQUESTS, pack(requests))
        else:
            self._submit_to_coordinator(0, requests)

    def _coordinate(self, decide: Callable[[Coordinator], list[Response]]) -> None:
        assert self._coordinator is not None
        # Deciding and sending under one lock: every rank must see the responses in one order.
        with self._coordination:
            for response in decide(self._coordinator):
                for request in response.requests:
                    self._timeline.agreed(request)
                for rank in self._membership.ranks[response.requests[0].process_set]:
                    self._send(rank, response)

    def _send(self, rank: Rank, response: Response) -> None:
        if rank == 0:
            self._enqueue([response])
        else:
            self._comm.post(rank, RESPONSES, pack([response]))

    def _submit_to_coordinator(self, rank: Rank, requests: Sequence[Request]) -> None:
        for request in requests:
            if request.process_set not in self._membership.ranks:
                self._send(rank, Response([request], error=f"process set {request.process_set} was removed"))
        known = [r for r in requests if r.process_set in self._membership.ranks]
        for request in known:
            self._timeline.asked(rank, request)
        self._coordinate(lambda c: c.submit(rank, known, self._comm.now()))

    # Handlers: the message service keeps what they raise to itself, so a failure is recorded here.

    def _take_requests(self, peer: Rank, message: Message) -> None:
        with self._failures_recorded():
            self._submit_to_coordinator(peer, unpack_requests(message))

    def _take_responses(self, peer: Rank, message: Message) -> None:
        with self._failures_recorded():
            self._enqueue(unpack_responses(message))

    def _take_failure(self, peer: Rank, message: Message) -> Message:
        self._record_failure(HorovodInternalError(unpack_text(message)))
        return Message({}, [])

    def _lose(self, peer: Rank) -> None:
        self._record_failure(PeerLost(f"rank {peer} is gone"))

    @contextlib.contextmanager
    def _failures_recorded(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self._record_failure(error)

    def _enqueue(self, responses: Sequence[Response]) -> None:
        with self._changed:
            self._incoming.extend(responses)
            self._changed.notify()

    def _answer(self, response: Response) -> None:
        first = response.requests[0]
        handles = [self._claim(r) for r in response.requests]
        if response.error:
            for handle in handles:
                handle.finish(HorovodInternalError(response.error))
            return
        self._timeline.begun(response.requests)
        try:
            if first.kind == "join":
                handles[0].number = response.last_joined
            elif first.kind == "add_process_set":
                handles[0].number = self._membership.add(first.splits)
            elif first.kind == "remove_process_set":
                self._remove_process_set(first.splits[0])
            else:
                perform(
                    self._membership.communicator(first.process_set), response, [h.entry for h in handles]
                )
        except BaseException as error:
            self._record_failure(error, f"{first.kind} {first.name}", handles)
            raise
        self._timeline.done(response.requests)
        for handle in handles:
            handle.finish()

    def _remove_process_set(self, process_set: int) -> None:
        if self._coordinator is not None:
            with self._coordination:
                self._coordinator.forget(process_set)
        self._membership.remove(process_set)
        with self._changed:
            orphans = [self._in_flight.pop(k) for k in list(self._in_flight) if k[0] == process_set]
        for handle in orphans:
            handle.finish(HorovodInternalError(f"process set {process_set} was removed"))

    def _claim(self, request: Request) -> Handle:
        with self._changed:
            handle = self._in_flight.pop((request.process_set, request.name), None)
        # A joined rank takes part in what it did not ask for.
        return handle or Handle(stand_in(request))

    def _check_stalls(self) -> None:
        assert self._coordinator is not None
        now_s = self._comm.now()
        if self._stall_shutdown_s > 0:
            self._coordinate(lambda c: c.fail_stalled(now_s, self._stall_shutdown_s))
        if self._stall_warning_s > 0:
            with self._coordination:
                sentences = self._coordinator.stalled(now_s, self._stall_warning_s)
            for sentence in sentences:
                print(f"paceline horovod: stalled: {sentence}", file=sys.stderr, flush=True)

    # Failure

    def _record_failure(self, error: BaseException, what: str = "", handles: Sequence[Handle] = ()) -> None:
        """Release every caller with the first failure; the thread then tells the other ranks."""
        kind = "" if isinstance(error, PacelineError) else f"{type(error).__name__}: "
        with self._changed:
            if self._failure is None:
                where = f"rank {self._comm.rank}: {what}: " if what else ""
                self._failure = HorovodInternalError(f"{where}{kind}{error}")
                self._failure.__cause__ = error
            failure = self._failure
            self._changed.notify()
        for handle in handles:
            handle.finish(failure)
        self._fail_all(failure)

    def _tell_failure(self, failure: BaseException) -> None:
        text = pack_text(str(failure))
        replies: list[Reply] = []
        for rank in range(self._comm.size):
            if rank != self._comm.rank:
                # A peer that is gone needs no message.
                with contextlib.suppress(PacelineError):
                    replies.append(self._comm.call(rank, FAILED, text))
        until_s = self._comm.now() + _TELL_FAILURE_S
        for reply in replies:
            with contextlib.suppress(PacelineError):
                reply.wait(max(0.1, until_s - self._comm.now()))

    def _fail_all(self, error: BaseException) -> None:
        with self._changed:
            handles, self._in_flight = list(self._in_flight.values()), {}
        for handle in handles:
            handle.finish(error)
