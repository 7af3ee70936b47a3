"""One shard of the parameter server: a slice of the model with its own clock. Runs inside message handlers.

An exchange is push, pull, or both. Updates are applied serially in the order of arrival; there is no lock, as
handlers of a rank run one at a time. Reads that a policy holds back are deferred replies.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from paceline.codecs.kernel.codec import Codec
from paceline.strategies.base.staleness_policy import StalenessPolicy
from paceline.strategies.server.encoding import Pulls
from paceline.strategies.server.tally import Tally
from paceline.types import Message, Rank, Reply


@dataclass
class Optimizer:
    """How a shard applies a scaled update: add it, or SGD with momentum on a gradient."""

    is_gradient: bool = False
    rate: float = 1.0
    lr: float = 0.1
    momentum: float = 0.0
    buffers: list[torch.Tensor] = field(default_factory=list)

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
    pieces: list[torch.Tensor]


class Shard:
    """Weights, clock, the workers' progress, collected updates and deferred reads."""

    def __init__(
        self,
        weights: Sequence[torch.Tensor],
        policy: StalenessPolicy,
        optimizer: Optimizer,
        num_workers: int,
        deferred: Callable[[], Reply],
        codec: Codec | None = None,
    ) -> None:
        self.weights = [w.clone() for w in weights]
        self.clock = 0
        self.seen = [0] * num_workers
        """Last exchange number of each worker."""
        self.clocks = [0] * num_workers
        """Each worker's own clock: its pushes."""
        self.tally = Tally(num_workers)
        self.away: set[Rank] = set()
        """Workers that rest (evaluation, saving), are finished, or died: they hold nobody up."""
        self.finished: set[Rank] = set()
        self.lost: set[Rank] = set()
        self._policy, self._optimizer, self._deferred = policy, optimizer, deferred
        self._num_workers = num_workers
        self.pulls = None if codec is None else Pulls(codec, self.weights, range(num_workers))
        self._collected: list[_Update] = []
        self._waiting: list[tuple[Rank, Reply]] = []

    def exchange(self, src: Rank, message: Message) -> Message | Reply | None:
        """Handle {"number", "version", "push", "pull", "state": "" | "rest" | "final"} + update pieces."""
        header = message.header
        number, state = int(header["number"]), str(header["state"])
        if number > self.seen[src]:
            self.seen[src] = number
            self._come_or_go(src, state)
            if header["push"]:
                self.clocks[src] += 1
                if message.tensors:
                    pieces = list(message.tensors)
                    if self.pulls is not None:
                        pieces = self.pulls.decode(pieces, self.weights)
                    self._arrive(_Update(src, int(header["version"]), pieces))
        self._settle()
        if not header["pull"]:
            return None
        if self._may_read(src):
            return self._answer(src)
        reply = self._deferred()
        self._waiting.append((src, reply))
        return reply

    def leave(self, src: Rank) -> None:
        """A worker died: it holds nobody up, and its deferred read is forgotten."""
        self.lost.add(src)
        self.away.add(src)
        self.tally.leave(src)
        self._waiting = [(r, reply) for r, reply in self._waiting if r != src]
        self._settle()

    def progress(self) -> torch.Tensor:
        """int64, shape (2, workers): exchange numbers seen, and clocks."""
        return torch.tensor([self.seen, self.clocks], dtype=torch.int64)

    def restore(self, clock: int, progress: torch.Tensor) -> None:
        """Go on from a copy of another rank's shard."""
        self.clock = clock
        self.seen, self.clocks = progress.tolist()
        if self.pulls is not None:
            self.pulls.known.clear()

    def set_state(self, src: Rank, state: str) -> None:
        """What a worker says about itself when a shard is rebuilt."""
        if state:
            self._come_or_go(src, state)

    def snapshot(self) -> Message:
        """Weights, clock and progress as they are now; once all are finished, also the staleness counts."""
        tensors = [*self.weights, self.progress()]
        if self._all_finished():
            tensors.append(self.tally.counts())
        return Message({"version": self.clock, **self.tally.totals()}, tensors)

    def _answer(self, src: Rank) -> Message:
        """What a worker pulls: as `snapshot`, its weights encoded if there is a codec; whole in the end."""
        message = self.snapshot()
        if self.pulls is None:
            return message
        if self._all_finished():
            self.pulls.whole(src, self.weights)
            return message
        payloads = self.pulls.encode(src, self.weights)
        if payloads is None:
            return message
        return Message({**message.header, "encoded": True}, [*payloads, *message.tensors[len(payloads) :]])

    def state_dict(self) -> dict[str, Any]:
        """What a continued run needs; no worker may be waiting."""
        return {
            "weights": self.weights,
            "clock": self.clock,
            "progress": self.progress(),
            "collected": [[u.src, u.version, u.pieces] for u in self._collected],
            "momentum": self._optimizer.buffers,
            "policy": self._policy.state_dict(),
            "pulls": {} if self.pulls is None else self.pulls.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`."""
        for own, saved in zip(self.weights, state["weights"], strict=True):
            own.copy_(saved)
        self.restore(state["clock"], state["progress"])
        self._collected = [_Update(src, version, list(p)) for src, version, p in state["collected"]]
        self._optimizer.buffers = list(state["momentum"])
        self._policy.load_state_dict(state["policy"])
        if self.pulls is not None:
            self.pulls.load_state_dict(state["pulls"])
        self.away.clear()
        self.finished.clear()

    def _come_or_go(self, src: Rank, state: str) -> None:
        if not state and src in self.away:
            self.away.discard(src)
            self.finished.discard(src)
            # Whoever comes back starts level with the slowest, else all would wait for it to catch up.
            self.clocks[src] = max(self.clocks[src], self._slowest(excluding=src))
        elif state:
            self.away.add(src)
            if state == "final":
                self.finished.add(src)
                self.tally.close()

    def _arrive(self, update: _Update) -> None:
        if self._policy.accepts(self.clock - update.version):
            self._collected.append(update)
        else:
            self.tally.drop(update.src)

    def _settle(self) -> None:
        """Apply what is complete, then answer the reads that may go on."""
        gone = self.away if self._policy.waits else self.finished | self.lost
        active = self._num_workers - len(gone)
        needed = min(self._policy.group, max(1, active))
        if len(self._collected) >= needed:
            self._apply_collected()
        still: list[tuple[Rank, Reply]] = []
        ready: list[tuple[Rank, Reply]] = []
        for src, reply in self._waiting:
            (ready if self._may_read(src) else still).append((src, reply))
        self._waiting = still
        for src, reply in ready:
            reply.set(self._answer(src))

    def _apply_collected(self) -> None:
        batch, self._collected = self._collected, []
        total: list[torch.Tensor] | None = None
        for update in batch:
            staleness = self.clock - update.version
            self.tally.add(update.src, staleness)
            factor = self._policy.scale(staleness) / len(batch)
            for i, piece in enumerate(update.pieces):
                self._policy.transform(i, piece)
                piece.mul_(factor)
            if total is None:
                total = update.pieces
            else:
                torch._foreach_add_(total, update.pieces)
        assert total is not None
        self._optimizer.apply(self.weights, total)
        self.clock += 1

    def _may_read(self, src: Rank) -> bool:
        if src in self.finished:
            return self._all_finished()
        if self._policy.waits and any(u.src == src for u in self._collected):
            return False
        gap = self._policy.gap
        return gap is None or self.clocks[src] - self._slowest(excluding=src) <= gap

    def _slowest(self, *, excluding: Rank) -> int:
        live = (c for r, c in enumerate(self.clocks) if r not in self.away and r != excluding)
        return min(live, default=self.clocks[excluding])

    def _all_finished(self) -> bool:
        return len(self.finished | self.lost) == self._num_workers
