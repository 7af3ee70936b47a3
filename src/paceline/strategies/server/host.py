"""Who holds which shard: the rank's message handler, live backups, and recovery after a death.

Every `backup_every` applied updates a shard posts its weights to the next living rank. When an owner dies,
the next living rank takes over: it asks everybody for the freshest copy (the backup, or what a worker last
pulled), and goes on from that. Updates that had been acknowledged but are not in it are counted as lost;
requests that were not answered are sent again by their workers and recognised by their numbers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from paceline.strategies.server.script import Script
from paceline.strategies.server.shard import Shard
from paceline.strategies.server.slices import owner
from paceline.types import Communicator, Message, Rank, Reply

CHANNEL = "parameter_server"


@dataclass
class Copy:
    """A shard's state as somebody remembers it."""

    version: int
    weights: list[torch.Tensor]
    progress: torch.Tensor


class ShardHost:
    """The server side of one rank. All methods but the constructor run as message handlers."""

    def __init__(
        self,
        comm: Communicator,
        num_shards: int,
        make_shard: Callable[[int, list[torch.Tensor]], Shard],
        initial: Callable[[int], list[torch.Tensor]],
        remembered: Callable[[int], Copy],
        *,
        backup_every: int,
        script: Script,
    ) -> None:
        self._comm, self._num_shards, self._make = comm, num_shards, make_shard
        self._remembered, self._backup_every, self.script = remembered, backup_every, script
        self.lost: set[Rank] = set()
        self.state = ""
        """This rank's own state, for whoever rebuilds a shard: "", "rest" or "final"."""
        self._backups: dict[int, Copy] = {}
        self._backed_up: dict[int, int] = {}
        self._held: dict[int, list[tuple[Rank, Message, Reply]]] = {}
        mine = [j for j in range(num_shards) if owner(j, num_shards, comm.size, set()) == comm.rank]
        self.shards = {j: make_shard(j, initial(j)) for j in mine}
        comm.serve(CHANNEL, self.handle)
        comm.on_lost(self._on_lost)

    def handle(self, src: Rank, message: Message) -> Message | Reply | None:
        """Route one message by its "op"."""
        op, j = message.header["op"], int(message.header["shard"])
        if op == "backup":
            self._keep(j, message)
            return None
        if op == "copy":
            return self._copy(j)
        shard = self.shards.get(j)
        if op == "peek" and shard is not None:
            return shard.snapshot()
        if shard is None:  # the sender noticed a death before we did, or we are still rebuilding
            reply = self._comm.deferred()
            self._held.setdefault(j, []).append((src, message, reply))
            return reply
        return self._exchange(j, shard, src, message)

    def state_dict(self) -> dict[str, Any]:
        """All shards of this rank."""
        return {str(j): shard.state_dict() for j, shard in self.shards.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`."""
        for j, saved in state.items():
            self.shards[int(j)].load_state_dict(saved)

    def _exchange(self, j: int, shard: Shard, src: Rank, message: Message) -> Message | Reply | None:
        if not self.script.may_go(j, src, int(message.header["number"])):
            reply = self._comm.deferred()
            self.script.hold(j, src, int(message.header["number"]), message, reply)
            return reply
        result = shard.exchange(src, message)
        self._back_up(j, shard)
        released = self.script.released(j)
        if released and result is not None:  # its weights change before it is sent: here, or once it is set
            first = self._comm.deferred()
            _forward(result, first, is_copied=True)
            result = first
        for later_src, later, reply in released:
            _forward(shard.exchange(later_src, later), reply)
            self._back_up(j, shard)
        return result

    def _back_up(self, j: int, shard: Shard) -> None:
        if not self._backup_every or shard.clock - self._backed_up.get(j, 0) < self._backup_every:
            return
        self._backed_up[j] = shard.clock
        size = self._comm.size
        target = next(
            (
                r % size
                for r in range(self._comm.rank + 1, self._comm.rank + size)
                if r % size not in self.lost
            ),
            None,
        )
        if target is not None:
            header: dict[str, int | str] = {"op": "backup", "shard": j, "version": shard.clock}
            self._comm.post(target, CHANNEL, Message(header, [*shard.weights, shard.progress()]))

    def _keep(self, j: int, message: Message) -> None:
        *weights, progress = message.tensors
        version = int(message.header["version"])
        if j not in self._backups or version >= self._backups[j].version:
            self._backups[j] = Copy(version, weights, progress)

    def _copy(self, j: int) -> Message:
        """The freshest copy of a shard that this rank has, and how much of its own work was acknowledged."""
        best = own = self._remembered(j)
        backup = self._backups.get(j)
        if backup is not None and backup.version > best.version:
            best = backup
        acknowledged = int(own.progress[0, self._comm.rank])
        header: dict[str, int | str] = {
            "version": best.version,
            "acknowledged": acknowledged,
            "state": self.state,
        }
        return Message(header, [*best.weights, best.progress])

    def _on_lost(self, rank: Rank) -> None:
        if rank in self.lost:
            return
        size = self._comm.size
        orphans = [j for j in range(self._num_shards) if owner(j, self._num_shards, size, self.lost) == rank]
        self.lost.add(rank)
        for shard in self.shards.values():
            shard.leave(rank)
        for j in orphans:
            if owner(j, self._num_shards, size, self.lost) == self._comm.rank:
                self._rebuild(j)

    def _rebuild(self, j: int) -> None:
        """Ask every living rank for its copy; when all have answered (or died), take over."""
        peers = [r for r in range(self._comm.size) if r not in self.lost]
        answers: dict[Rank, Message] = {}
        open_calls = set(peers)

        def arrived(peer: Rank, outcome: Message | BaseException) -> None:
            if isinstance(outcome, Message):
                answers[peer] = outcome
            open_calls.discard(peer)
            if not open_calls:
                self._take_over(j, answers)

        for peer in peers:
            call = self._comm.call(peer, CHANNEL, Message({"op": "copy", "shard": j}))
            call.then(lambda outcome, peer=peer: arrived(peer, outcome))  # type: ignore[misc]

    def _take_over(self, j: int, answers: dict[Rank, Message]) -> None:
        freshest = max(sorted(answers), key=lambda r: int(answers[r].header["version"]))
        *weights, progress = answers[freshest].tensors
        shard = self._make(j, weights)
        shard.restore(int(answers[freshest].header["version"]), progress)
        for peer, answer in sorted(answers.items()):
            shard.tally.lost += max(0, int(answer.header["acknowledged"]) - int(progress[0, peer]))
            shard.set_state(peer, str(answer.header["state"]))
        for rank in sorted(self.lost):
            shard.leave(rank)
        self.shards[j] = shard
        for src, message, reply in self._held.pop(j, []):
            if src not in self.lost:
                _forward(self.handle(src, message), reply)


def _forward(result: Message | Reply | None, reply: Reply, *, is_copied: bool = False) -> None:
    def arrived(outcome: Message | BaseException) -> None:
        if not isinstance(outcome, Message):
            reply.fail(outcome)
        elif is_copied:
            reply.set(Message(outcome.header, [t.clone() for t in outcome.tensors]))
        else:
            reply.set(outcome)

    if result is None or isinstance(result, Message):
        arrived(result or Message())
    else:
        result.then(arrived)
