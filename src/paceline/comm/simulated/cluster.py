"""The state that all workers of a simulation share: compute times, messages, faults and the log."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import numpy as np

from paceline.comm.ledger import Ledger
from paceline.comm.messages import framing
from paceline.comm.messages.channels import Answer, Channels
from paceline.comm.simulated.clock import AwaitedThing, Signal, VirtualClock, VirtualWorker
from paceline.comm.simulated.compute_time import Draw
from paceline.comm.simulated.event_log import EventLog
from paceline.comm.simulated.faults import FOREVER, Faults
from paceline.comm.simulated.message_service import MessageService
from paceline.comm.simulated.network import SimulatedNetwork
from paceline.errors import CommError, PeerLost
from paceline.types import Handler, Message

OUTBOX_BYTES = 64 << 20

Outcome = Message | BaseException


def wait(signal: Signal, awaited: AwaitedThing, timeout_s: float | None, ledger: Ledger | None) -> None:
    """Block in virtual time and count the time in `ledger`. Raises Timeout."""
    start_s = signal.clock.now
    try:
        signal.wait(awaited, timeout_s)
    finally:
        if ledger is not None:
            ledger.wait_s += signal.clock.now - start_s


class SimulatedReply:
    """A promise of a Message in virtual time."""

    def __init__(self, clock: VirtualClock, awaited: str = "a deferred reply") -> None:
        self._signal = Signal(clock)
        self._awaited = awaited
        self.ledger: Ledger | None = None
        """Where the time spent in `wait` is counted."""
        self._outcome: Outcome | None = None
        self._callbacks: list[Callable[[Outcome], None]] = []

    def wait(self, timeout_s: float | None = None) -> Message:
        """Block in virtual time until answered. Raises Timeout, PeerLost, or the handler's error."""
        wait(self._signal, self._awaited, timeout_s, self.ledger)
        if isinstance(self._outcome, Message):
            return self._outcome
        assert self._outcome is not None
        raise self._outcome

    def is_done(self) -> bool:
        """Whether `wait` would return (or raise) at once."""
        return self._outcome is not None

    def set(self, message: Message) -> None:
        """Answer. A second answer is ignored."""
        self._finish(message)

    def fail(self, error: BaseException) -> None:
        """Answer with an error."""
        self._finish(error)

    def then(self, callback: Callable[[Outcome], None]) -> None:
        """Call `callback(outcome)` once set; at once if it is."""
        if self._outcome is None:
            self._callbacks.append(callback)
        else:
            callback(self._outcome)

    def _finish(self, outcome: Outcome) -> None:
        if self._outcome is None:
            self._outcome = outcome
            self._signal.set()
            callbacks, self._callbacks = self._callbacks, []
            for callback in callbacks:
                callback(outcome)


class SimulatedCluster:
    """The workers of a simulation, which exchange messages over a simulated network."""

    def __init__(
        self,
        clock: VirtualClock,
        *,
        num_workers: int,
        network: SimulatedNetwork,
        compute: Draw,
        speeds: list[float],
        faults: Faults,
        log: EventLog,
        seed: int,
        detect_s: float,
    ) -> None:
        self.clock, self.network, self.faults, self.log = clock, network, faults, log
        self.num_workers = num_workers
        self.lost: set[int] = set()
        """Ranks whose death the others have noticed."""
        self.on_kill: list[Callable[[int], None]] = []
        """Called with a rank when its death is noticed, before the message handlers are."""
        self._compute, self._speeds, self._detect_s = compute, speeds, detect_s
        self._draws = [np.random.default_rng([seed, r, 0xC0]) for r in range(num_workers)]
        self._drawn_s = [0.0] * num_workers
        """Compute time of the current minibatch of each rank; 0 before it is drawn."""
        self._used = [0.0] * num_workers
        """Share of that time that has passed."""
        self._ledgers: list[Ledger | None] = [None] * num_workers
        self.off_clock: set[int] = set()
        """Ranks that evaluate: what they send takes no virtual time."""
        self._channels = [Channels(r) for r in range(num_workers)]
        self._services = [MessageService(clock, r) for r in range(num_workers)]
        self._is_free = False
        """Whether the message that is handled right now takes no virtual time."""
        self.work_s: list[dict[str, float]] = [{} for _ in range(num_workers)]
        """Seconds of each rank's local work, by kind."""
        clock.on_work = lambda rank, start_s, end_s: log.add("work", "local work", rank, start_s, end_s)
        self._calls: dict[int, tuple[int, int, SimulatedReply]] = {}
        self._num_calls = 0
        self._in_flight = [0] * num_workers
        """Messages and answers of each rank that have not been handled."""
        self._drained: list[list[Signal]] = [[] for _ in range(num_workers)]
        self._loss_callbacks: list[list[Callable[[int], None]]] = [[] for _ in range(num_workers)]
        self._lost_messages: dict[tuple[int, int], str] = {}
        clock.explain_wait = self._describe_lost_messages
        for name, phases in faults.phases().items():
            for phase in phases:
                for rank in phase.ranks:
                    log.add("fault", name, rank, phase.start_s, phase.end_s)
        for rank, at_s in faults.kills:
            clock.at(at_s, rank, partial(self._kill, rank))
        for pause in faults.pauses:
            for rank in pause.ranks:
                clock.at(pause.start_s, rank, partial(self._pause, rank, pause.end_s))

    # Compute

    def compute(self, rank: int, share: float) -> None:
        """Let `share` of one minibatch's compute time pass for `rank`, the running worker."""
        clock = self.clock
        if not self._drawn_s[rank]:
            self._drawn_s[rank] = self._compute(self._draws[rank]) / self._speeds[rank]
            self._used[rank] = 0.0
        seconds = share * self._drawn_s[rank] * self.faults.slowdown(rank, clock.now)
        self._used[rank] += share
        if self._used[rank] >= 1.0 - 1e-9:  # the minibatch is over: draw again for the next
            self._drawn_s[rank] = 0.0
        self.log.add("compute", "minibatch", rank, clock.now, clock.now + seconds)
        clock.sleep(seconds, "its own computation")

    def work(self, kind: str, seconds: float) -> None:
        """Let work take its time on the rank whose handler runs, or on the running worker."""
        clock = self.clock
        is_handler = clock.in_handler >= 0
        rank = clock.in_handler if is_handler else clock.running.rank
        if rank in self.off_clock or (is_handler and self._is_free):
            return
        seconds *= self.faults.slowdown(rank, clock.now) / self._speeds[rank]
        self.work_s[rank][kind] = self.work_s[rank].get(kind, 0.0) + seconds
        if not is_handler:
            clock.owe(seconds)
            return
        start_s = self._services[rank].reached_s
        self._services[rank].work(seconds)
        self.log.add("work", kind, rank, start_s, start_s + seconds)

    # Messages

    def host(self, rank: int) -> str:
        """Name of the rank's host."""
        return self.network.topology.hosts[rank]

    def serve(self, rank: int, channel: str, handler: Handler, ledger: Ledger) -> None:
        """Install a handler of `rank`; it takes the virtual time of the work that it does."""
        self._ledgers[rank] = ledger
        with self._as_handler(rank):
            self._channels[rank].serve(channel, handler)

    def call(self, src: int, dst: int, channel: str, message: Message) -> SimulatedReply:
        """Send a request; its answer arrives later."""
        framing.check(message)
        reply = SimulatedReply(self.clock, f"the answer of rank {dst} on channel {channel!r}")
        if dst in self.lost:
            reply.fail(self._lost_error(src, dst))
            return reply
        self._num_calls += 1
        id = self._num_calls
        self._calls[id] = (src, dst, reply)

        def answer(outcome: Outcome) -> None:
            if id not in self._calls:
                return
            if isinstance(outcome, Message):
                try:
                    framing.check(outcome)
                    outcome = framing.owned(outcome)
                except Exception as error:
                    outcome = error
            size = framing.num_bytes(outcome) if isinstance(outcome, Message) else 0
            ledger = self._ledgers[dst]
            if ledger is not None:
                ledger.operations["answer"].calls += 1
                ledger.operations["answer"].payload_bytes += size
                ledger.own_bytes += size if dst == src else 0
                if dst != src and ledger.wire_bytes is not None:
                    ledger.wire_bytes += size + self.network.header_bytes
            result: Outcome = outcome
            if not isinstance(outcome, Message):
                text = f"{type(outcome).__name__}: {outcome}"
                result = CommError(f"rank {dst}: handler of channel {channel!r} failed: {text}")
            answered = partial(self._answered, id, result)
            # To itself: the service has the answer in hand, and need not wait for its turn again.
            self._transfer(dst, src, f"{channel} answer", size, answered, is_queued=src != dst)

        self._send(src, dst, channel, framing.owned(message), answer)
        return reply

    def post(self, src: int, dst: int, channel: str, message: Message) -> None:
        """Send a message without an answer; waits while the sender's port is far behind."""
        framing.check(message)
        if dst in self.lost:
            raise self._lost_error(src, dst)
        self._send(src, dst, channel, framing.owned(message), None)

    def drain(self, rank: int) -> None:
        """Wait until all messages that `rank` has sent are handled."""
        while self._in_flight[rank]:
            signal = Signal(self.clock)
            self._drained[rank].append(signal)
            signal.wait("its own messages to be handled")

    def raise_stored(self, rank: int) -> None:
        """Raise the error of a posted message's handler, once."""
        self._channels[rank].raise_stored()

    def on_lost(self, rank: int, callback: Callable[[int], None]) -> None:
        """Call `callback(peer)` as a handler of `rank` when the death of a peer is noticed, or has been."""
        self._loss_callbacks[rank].append(callback)
        for peer in sorted(self.lost):
            callback(peer)

    def _send(self, src: int, dst: int, channel: str, message: Message, answer: Answer | None) -> None:
        if self.clock.in_handler < 0:
            self._channels[src].raise_stored()
            backlog, seconds_per_byte = self.network.backlog_bytes(src, dst, self.clock.now)
            if backlog > OUTBOX_BYTES:
                self.clock.sleep(
                    (backlog - OUTBOX_BYTES) * seconds_per_byte, f"room in its outbox to rank {dst}"
                )
        deliver = partial(self._deliver, src, dst, channel, message, answer)
        self._transfer(src, dst, channel, framing.num_bytes(message), deliver)

    def _transfer(
        self, src: int, dst: int, name: str, size: int, action: Callable[[], None], *, is_queued: bool = True
    ) -> None:
        """Move bytes from src to dst, then run `action` on behalf of dst (unless it is dead).

        `is_queued`: when dst's message service has handled what came before.
        """
        self._in_flight[src] += 1

        def arrive() -> None:
            worker = self.clock.workers[dst]
            if worker.paused_until > self.clock.now and not worker.is_killed:
                self.clock.at(worker.paused_until, dst, arrive)
                return
            if is_queued:
                service.submit(handle)
            else:
                handle()

        def handle() -> None:
            if not self.clock.workers[dst].is_killed:
                before, self._is_free = self._is_free, is_free
                with self._as_handler(dst):
                    action()
                self._is_free = before
            if service.reached_s > self.clock.now:
                self.clock.at(service.reached_s, dst, partial(self._handled, src))
            else:
                self._handled(src)

        service = self._services[dst]
        is_free = src in self.off_clock or dst in self.off_clock
        if not self.carry(src, dst, name, size, arrive, is_free=is_free):
            self._in_flight[src] -= 1

    def _handled(self, src: int) -> None:
        """A message of `src` has been handled, or needs not be."""
        self._in_flight[src] -= 1
        if not self._in_flight[src]:
            waiting, self._drained[src] = self._drained[src], []
            for signal in waiting:
                signal.set()

    def carry(
        self, src: int, dst: int, name: str, size: int, arrive: Callable[[], None], *, is_free: bool = False
    ) -> bool:
        """Move bytes over the links from src to dst, then call `arrive`; returns whether they will arrive.

        The message is logged once its time of arrival is known.

        Args:
            src: Sending rank.
            dst: Receiving rank.
            name: Name of the message in the log.
            size: Bytes of its tensors.
            arrive: What happens on arrival.
            is_free: Whether it takes no virtual time.
        """
        clock, network = self.clock, self.network
        sent_s = self._services[src].reached_s if clock.in_handler == src else clock.now
        path = [] if is_free else network.path(src, dst)
        leaves_s = sent_s if is_free else network.leaves_s(src, dst, sent_s)
        if leaves_s == FOREVER:
            self.log.add("lost", name, src, sent_s, sent_s, peer=dst, num_bytes=size)
            why = self.faults.closed_for_ever(src, dst, sent_s)
            text = f"rank {src}'s message {name!r} to rank {dst} at {sent_s:.6f} s was lost: {why}"
            self._lost_messages.setdefault((src, dst), text)
            return False

        def hop(index: int, first_byte_s: float, arrived_s: float) -> None:
            if index < len(path):
                first_byte_s, arrived_s = network.pass_link(path[index], size, first_byte_s, arrived_s)
            if index + 1 < len(path):
                clock.at(first_byte_s, dst, partial(hop, index + 1, first_byte_s, arrived_s))
                return
            self.log.add("message", name, src, sent_s, arrived_s, peer=dst, num_bytes=size)
            clock.at(arrived_s, dst, arrive)

        if leaves_s > clock.now:
            clock.at(leaves_s, src, partial(hop, 0, leaves_s, leaves_s))
        else:
            hop(0, sent_s, sent_s)
        return True

    def _deliver(self, src: int, dst: int, channel: str, message: Message, answer: Answer | None) -> None:
        self._channels[dst].deliver(src, channel, message, answer)

    def _answered(self, id: int, outcome: Outcome) -> None:
        _, _, reply = self._calls.pop(id, (0, 0, None))
        if reply is None:
            return
        if isinstance(outcome, Message):
            reply.set(outcome)
        else:
            reply.fail(outcome)

    def _as_handler(self, rank: int) -> _HandlerScope:
        return _HandlerScope(self.clock, rank)

    def _describe_lost_messages(self) -> str:
        """The first message that a fault lost, and the other links on which messages were lost."""
        if not self._lost_messages:
            return ""
        first, *others = self._lost_messages
        links = ", ".join(f"{src}→{dst}" for src, dst in others[:8]) + (" …" if len(others) > 8 else "")
        also = f"; also lost on {links}" if others else ""
        return f"; {self._lost_messages[first]}{also}"

    # Faults

    def _pause(self, rank: int, until_s: float) -> None:
        clock = self.clock
        clock.workers[rank].paused_until = max(clock.workers[rank].paused_until, until_s)
        self.log.add("fault", "pause", rank, clock.now, until_s)

    def _kill(self, rank: int) -> VirtualWorker | None:
        clock = self.clock
        worker = clock.workers[rank]
        if worker.is_killed or worker.is_over:
            return None
        self.log.add("fault", "kill", rank, clock.now, clock.now)
        noticed_s = clock.now + self._detect_s + self.network.latency_s
        clock.at(noticed_s, rank, partial(self._noticed, rank))
        return clock.kill(rank)

    def _noticed(self, rank: int) -> None:
        """The others notice a death by its broken connections."""
        self.lost.add(rank)
        for id, (src, dst, reply) in sorted(self._calls.items()):
            if dst == rank:
                del self._calls[id]
                reply.fail(self._lost_error(src, dst))
            elif src == rank:
                del self._calls[id]
        for callback in list(self.on_kill):
            callback(rank)
        for worker in self.clock.workers:
            if not worker.is_killed:
                for callback in list(self._loss_callbacks[worker.rank]):
                    with self._as_handler(worker.rank):
                        callback(rank)

    def _lost_error(self, src: int, dst: int) -> PeerLost:
        return PeerLost(f"rank {src}: rank {dst} is lost: its process ended")


class _HandlerScope:
    """Marks that a handler runs, which must not wait."""

    def __init__(self, clock: VirtualClock, rank: int) -> None:
        self._clock, self._rank, self._before = clock, rank, -1

    def __enter__(self) -> None:
        self._before, self._clock.in_handler = self._clock.in_handler, self._rank

    def __exit__(self, *_: object) -> None:
        self._clock.in_handler = self._before
