"""The background thread: hands named operations to the coordinator and performs them in its order.

Submitting never waits. Rank 0 holds the coordinator; requests and responses travel as messages, so ranks may
submit in different orders. Only this thread touches the communicators of the process sets.
"""

from __future__ import annotations

import sys
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence

import torch

from paceline.compat.horovod.constants import HorovodInternalError
from paceline.compat.horovod.coordinator import Coordinator
from paceline.compat.horovod.perform import SubmittedOperation, perform, stand_in
from paceline.compat.horovod.request import Request, Response, pack, unpack_requests, unpack_responses
from paceline.errors import PacelineError
from paceline.types import Communicator, Message, Rank

REQUESTS, RESPONSES = "horovod/requests", "horovod/responses"
_CHECK_STALLS_EVERY_S = 1.0


class Handle:
    """A submitted operation: an entry, and whether it is done."""

    def __init__(self, entry: SubmittedOperation) -> None:
        self.entry = entry
        self.error: BaseException | None = None
        self.last_joined = -1
        self.done = threading.Event()

    def finish(self, error: BaseException | None = None) -> None:
        """Mark as done; `error` is raised where the result is asked for."""
        self.error = error
        self.done.set()


class OperationThread:
    """One per process between `init` and `shutdown`."""

    def __init__(
        self,
        comm: Communicator,
        communicators: Mapping[int, Communicator],
        process_sets: Mapping[int, Sequence[int]],
        *,
        fusion_bytes: int,
        stall_warning_s: float,
        stall_shutdown_s: float,
    ) -> None:
        self._comm = comm
        self._communicators = communicators
        self._process_sets = process_sets
        self._stall_warning_s, self._stall_shutdown_s = stall_warning_s, stall_shutdown_s
        self._changed = threading.Condition()
        self._outgoing: list[Request] = []
        self._incoming: deque[Response] = deque()
        self._in_flight: dict[tuple[int, str], Handle] = {}
        self._has_joined = False
        self._failure: BaseException | None = None
        self._is_stopping = False
        self._coordinator = Coordinator(process_sets, fusion_bytes=fusion_bytes) if comm.rank == 0 else None
        self._coordination = threading.Lock()
        if self._coordinator is not None:
            comm.serve(REQUESTS, self._take_requests)
        comm.serve(RESPONSES, self._take_responses)
        # No rank may post before every rank serves.
        comm.barrier().wait()
        self._thread = threading.Thread(target=self._run, name="paceline-horovod", daemon=True)
        self._thread.start()

    def submit(self, entry: SubmittedOperation) -> Handle:
        """Queue an operation; HorovodInternalError if its name is in flight already."""
        handle = Handle(entry)
        key = (entry.request.process_set, entry.request.name)
        with self._changed:
            if self._failure is not None:
                raise HorovodInternalError(f"an earlier operation failed: {self._failure}") from self._failure
            if key in self._in_flight:
                raise HorovodInternalError(
                    f"duplicate tensor name {entry.request.name!r}: an operation of that name is still in "
                    "flight; give each concurrent operation a name of its own"
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
        self._fail_all(HorovodInternalError("hvd.shutdown() was called while operations were in flight"))

    @torch.no_grad()
    def _run(self) -> None:
        next_check_s = self._comm.now() + _CHECK_STALLS_EVERY_S
        try:
            while True:
                with self._changed:
                    if not (self._outgoing or self._incoming or self._is_stopping):
                        self._changed.wait(_CHECK_STALLS_EVERY_S)
                    if self._is_stopping:
                        return
                    requests, self._outgoing = self._outgoing, []
                    response = self._incoming.popleft() if self._incoming else None
                if requests:
                    self._ask(requests)
                if response is not None:
                    self._answer(response)
                if self._coordinator is not None and self._comm.now() >= next_check_s:
                    next_check_s = self._comm.now() + _CHECK_STALLS_EVERY_S
                    self._check_stalls()
        except BaseException as error:
            with self._changed:
                self._failure = error
            self._fail_all(HorovodInternalError(str(error)))

    def _ask(self, requests: Sequence[Request]) -> None:
        if self._coordinator is None:
            self._comm.post(0, REQUESTS, pack(requests))
        else:
            self._coordinate(lambda c: c.submit(0, requests, self._comm.now()))

    def _coordinate(self, decide: Callable[[Coordinator], list[Response]]) -> None:
        assert self._coordinator is not None
        # Deciding and sending under one lock: every rank must see the responses in one order.
        with self._coordination:
            for response in decide(self._coordinator):
                for rank in self._process_sets[response.requests[0].process_set]:
                    if rank == 0:
                        self._enqueue([response])
                    else:
                        self._comm.post(rank, RESPONSES, pack([response]))

    def _take_requests(self, peer: Rank, message: Message) -> None:
        requests = unpack_requests(message)
        self._coordinate(lambda c: c.submit(peer, requests, self._comm.now()))

    def _take_responses(self, peer: Rank, message: Message) -> None:
        self._enqueue(unpack_responses(message))

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
        if first.kind == "join":
            handles[0].last_joined = response.last_joined
            self._has_joined = False
            handles[0].finish()
            return
        try:
            perform(self._communicators[first.process_set], response, [h.entry for h in handles])
        except ValueError as error:
            for handle in handles:
                handle.finish(error)
            return
        except PacelineError as error:
            for handle in handles:
                handle.finish(HorovodInternalError(f"{first.kind} {first.name}: {error}"))
            raise
        for handle in handles:
            handle.finish()

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

    def _fail_all(self, error: BaseException) -> None:
        with self._changed:
            handles, self._in_flight = list(self._in_flight.values()), {}
        for handle in handles:
            handle.finish(error)
