"""One shard of the parameter server: a slice of the model with its own clock. Runs inside message handlers.

Updates are applied serially in the order of arrival; there is no lock, as handlers of a rank run one at a
time. Reads that a policy holds back are deferred replies.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from paceline import local_work
from paceline.codecs.kernel.codec import Codec
from paceline.local_work import WorkKind
from paceline.strategies.base.staleness_policy import StalenessPolicy
from paceline.strategies.server.encoding import PullEncoder
from paceline.strategies.server.protocol import Presence, ShardCopy, ShardExchange
from paceline.strategies.server.tally import Tally
from paceline.types import Message, Rank, Reply


@dataclass
class ShardOptimizer:
    """How a shard applies a scaled update: add it, or SGD with momentum on a gradient."""

    is_gradient: bool
    rate: float
    """Factor on every update."""
    lr: float
    """Learning rate; for gradients only."""
    momentum: float
    """For gradients only."""
    buffers: list[torch.Tensor] = field(default_factory=list)

    def describe(self) -> str:
        """What decides how long `apply` takes."""
        return ("momentum" if self.momentum else "SGD") if self.is_gradient else "added"

    def apply(self, weights: list[torch.Tensor], update: list[torch.Tensor]) -> None:
        """Change `weights` in place."""
        if not self.is_gradient:
            torch._foreach_add_(weights, update, alpha=self.rate)
            return
        if self.momentum:
            if not self.buffers:
                self.buffers = [torch.zeros_like(w) for w in weights]
            torch._foreach_mul_(self.buffers, self.momentum)
            torch._foreach_add_(self.buffers, update)
            update = self.buffers
        torch._foreach_add_(weights, update, alpha=-self.lr * self.rate)


@dataclass
class _Update:
    src: Rank
    version: int
    """The shard's clock at the pull that the update was computed from."""
    pieces: list[torch.Tensor]


class Shard:
    """Weights, clock, the workers' progress, collected updates and deferred reads.

    Args:
        weights: The slice's pieces; cloned.
        policy: What is done with late updates; this shard's own instance.
        optimizer: How updates are applied; this shard's own instance.
        num_workers: Number of ranks, all of which are workers.
        deferred: Makes a reply that is set later.
        codec: Encodes updates and answers; None sends both uncompressed.
        number: Which shard this is, so that its encoder's random numbers are its own.
    """

    def __init__(
        self,
        weights: Sequence[torch.Tensor],
        policy: StalenessPolicy,
        optimizer: ShardOptimizer,
        num_workers: int,
        deferred: Callable[[], Reply],
        codec: Codec | None = None,
        number: int = 0,
    ) -> None:
        self.weights = [w.clone() for w in weights]
        self.clock = 0
        """Number of times that updates were applied."""
        self.seen = [0] * num_workers
        """Last exchange number of each worker."""
        self.clocks = [0] * num_workers
        """Each worker's own clock: its pushes."""
        self.tally = Tally(num_workers)
        self.away: set[Rank] = set()
        """Workers that rest (evaluation, saving), have finished, or died: no other waits for them."""
        self.finished: set[Rank] = set()
        self.lost: set[Rank] = set()
        self._policy, self._optimizer, self._deferred = policy, optimizer, deferred
        self._num_workers = num_workers
        self.pulls = None if codec is None else PullEncoder(codec, number, self.weights, range(num_workers))
        self._collected: list[_Update] = []
        self._waiting: list[tuple[Rank, Reply]] = []

    def exchange(self, src: Rank, exchange: ShardExchange) -> Message | Reply | None:
        """Handle a push, pull or both. One that is sent again (a known number) changes nothing."""
        if exchange.number > self.seen[src]:
            self.seen[src] = exchange.number
            self.set_presence(src, exchange.presence)
            if exchange.is_push:
                self.clocks[src] += 1
                if exchange.pieces:
                    self._collect(src, exchange)
        self._settle()
        if not exchange.is_pull:
            return None
        if self._may_read(src):
            return self._answer(src)
        reply = self._deferred()
        self._waiting.append((src, reply))
        return reply

    def set_presence(self, src: Rank, presence: Presence) -> None:
        """Note whether others may have to wait for worker `src`."""
        if presence is Presence.TRAINING:
            if src in self.away:
                self.away.discard(src)
                self.finished.discard(src)
                # A worker that comes back starts level with the slowest: else all would wait for it.
                self.clocks[src] = max(self.clocks[src], self._slowest(excluding=src))
            return
        self.away.add(src)
        if presence is Presence.FINISHED:
            self.finished.add(src)
            self.tally.close()

    def leave(self, src: Rank) -> None:
        """Worker `src` died: no other waits for it, and its deferred read is forgotten."""
        self.lost.add(src)
        self.away.add(src)
        self.tally.leave(src)
        self._waiting = [(rank, reply) for rank, reply in self._waiting if rank != src]
        self._settle()

    def progress(self) -> torch.Tensor:
        """int64, shape (2, workers): exchange numbers seen, and clocks."""
        return torch.tensor([self.seen, self.clocks], dtype=torch.int64)

    def restore(self, clock: int, progress: torch.Tensor) -> None:
        """Take clock and progress over from a copy of the shard."""
        self.clock = clock
        self.seen, self.clocks = progress.tolist()
        if self.pulls is not None:
            self.pulls.known.clear()

    def copy(self) -> ShardCopy:
        """The state that a backup holds; it shares memory with the shard."""
        return ShardCopy(self.clock, self.weights, self.progress())

    def snapshot(self) -> Message:
        """Weights, clock and progress as they are now; once all have finished, also staleness counts."""
        tensors = [*self.weights, self.progress()]
        if self._all_finished():
            tensors.append(self.tally.counts())
        return Message({"version": self.clock, **self.tally.totals()}, tensors)

    def _answer(self, src: Rank) -> Message:
        """What a worker pulls: a snapshot, with encoded weights if there is a codec; whole at the end."""
        message = self.snapshot()
        payloads = None
        if self.pulls is not None and self._all_finished():
            self.pulls.sent_whole(src, self.weights)
        elif self.pulls is not None:
            payloads = self.pulls.encode(src, self.weights)
        if payloads is None:
            local_work.charge_passes(self.weights, 1, WorkKind.SERVER)  # the copy that travels
            return message
        return Message({**message.header, "encoded": True}, [*payloads, *message.tensors[len(payloads) :]])

    def state_dict(self) -> dict[str, Any]:
        """What a continued run needs; no worker may be waiting."""
        return {
            "weights": self.weights,
            "clock": self.clock,
            "progress": self.progress(),
            "collected": [[update.src, update.version, update.pieces] for update in self._collected],
            "momentum": self._optimizer.buffers,
            "policy": self._policy.state_dict(),
            "pulls": {} if self.pulls is None else self.pulls.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for own, saved in zip(self.weights, state["weights"], strict=True):
            own.copy_(saved)
        self.restore(state["clock"], state["progress"])
        self._collected = [_Update(src, version, list(pieces)) for src, version, pieces in state["collected"]]
        self._optimizer.buffers = list(state["momentum"])
        self._policy.load_state_dict(state["policy"])
        if self.pulls is not None:
            self.pulls.load_state_dict(state["pulls"])
        self.away.clear()
        self.finished.clear()

    def _collect(self, src: Rank, exchange: ShardExchange) -> None:
        """Keep an update until it is applied with others, unless the policy drops it."""
        pieces = list(exchange.pieces)
        if self.pulls is not None:
            pieces = self.pulls.decode(pieces, self.weights)
        if self._policy.accepts(self.clock - exchange.version):
            self._collected.append(_Update(src, exchange.version, pieces))
        else:
            self.tally.drop(src)

    def _settle(self) -> None:
        """Apply the collected updates if there are enough, then answer the reads that may go on."""
        gone = self.away if self._policy.waits else self.finished | self.lost
        active = self._num_workers - len(gone)
        if len(self._collected) >= min(self._policy.group, max(1, active)):
            self._apply_collected()
        still: list[tuple[Rank, Reply]] = []
        ready: list[tuple[Rank, Reply]] = []
        for src, reply in self._waiting:
            (ready if self._may_read(src) else still).append((src, reply))
        self._waiting = still
        for src, reply in ready:
            reply.set(self._answer(src))

    def _apply_collected(self) -> None:
        """Apply the mean of the collected updates, each scaled by its staleness: one tick of the clock."""
        batch, self._collected = self._collected, []
        for update in batch:
            self.tally.add(update.src, self.clock - update.version)
        # Below 0: a backup took over, and is behind the shard from which the worker read.
        late = [(update.pieces, max(0, self.clock - update.version)) for update in batch]
        _apply(self._policy, self._optimizer, self.weights, late)
        self.clock += 1
        if not local_work.is_heard():
            return

        def rehearsal() -> Callable[[], object]:
            own = copy.deepcopy((self._policy, self._optimizer, self.weights, late))
            return lambda: _apply(*own)

        what = f"{self._policy.describe()}, {self._optimizer.describe()}, {len(batch)} updates"
        local_work.charge(WorkKind.SERVER, what, sum(w.numel() for w in self.weights), rehearsal)

    def _may_read(self, src: Rank) -> bool:
        if src in self.finished:
            return self._all_finished()
        if self._policy.waits and any(update.src == src for update in self._collected):
            return False
        gap = self._policy.gap
        return gap is None or self.clocks[src] - self._slowest(excluding=src) <= gap

    def _slowest(self, *, excluding: Rank) -> int:
        live = (clock for r, clock in enumerate(self.clocks) if r not in self.away and r != excluding)
        return min(live, default=self.clocks[excluding])

    def _all_finished(self) -> bool:
        return len(self.finished | self.lost) == self._num_workers


def _apply(
    policy: StalenessPolicy,
    optimizer: ShardOptimizer,
    weights: list[torch.Tensor],
    batch: Sequence[tuple[list[torch.Tensor], int]],
) -> None:
    """Change `weights` by the mean of updates, each scaled by its staleness; the updates are used up."""
    total: list[torch.Tensor] | None = None
    for pieces, staleness in batch:
        factor = policy.scale(staleness) / len(batch)
        for i, piece in enumerate(pieces):
            policy.transform(i, piece)
            piece.mul_(factor)
        if total is None:
            total = pieces
        else:
            torch._foreach_add_(total, pieces)
    assert total is not None
    optimizer.apply(weights, total)
