"""Who holds which shard: the rank's message handler, live backups, and recovery after a death.

Every `backup_every` applied updates a shard posts its weights to the next living rank. When an owner dies,
the next living rank takes over: it asks all living ranks for the freshest copy (the backup, or what a worker
last pulled) and goes on from that. Updates that had been acknowledged but are not in it are counted as lost;
requests that were not answered are sent again by their workers and recognised by their numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch

from paceline.strategies.server.ownership import owner
from paceline.strategies.server.protocol import (
    Presence,
    RankView,
    ServerOperation,
    ShardCopy,
    ShardExchange,
)
from paceline.strategies.server.recording import Recording
from paceline.strategies.server.shard import Shard
from paceline.types import Communicator, Message, Rank, Reply


class ShardHost:
    """The server side of one rank. All methods but the constructor run as message handlers.

    Args:
        comm: The ranks that host shards and train.
        channel: Where it listens; the same on all ranks.
        num_shards: Number of shards of all ranks together.
        make_shard: Makes a shard from its index and its weights.
        initial: Weights of a shard at the start of training.
        remembered: A shard as this rank's worker last pulled it.
        view: Shared with this rank's client.
        backup_every: Applied updates between two backups of a shard; 0 makes none.
        recording: The order of exchanges, recorded or enforced.
    """

    def __init__(
        self,
        comm: Communicator,
        *,
        channel: str,
        num_shards: int,
        make_shard: Callable[[int, Sequence[torch.Tensor]], Shard],
        initial: Callable[[int], list[torch.Tensor]],
        remembered: Callable[[int], ShardCopy],
        view: RankView,
        backup_every: int,
        recording: Recording,
    ) -> None:
        self._comm, self._channel = comm, channel
        self._num_shards, self._make_shard = num_shards, make_shard
        self._remembered, self._backup_every, self._recording = remembered, backup_every, recording
        self._view = view
        self._backups: dict[int, ShardCopy] = {}
        self._backed_up: dict[int, int] = {}
        """Clock of each own shard at its last backup."""
        self._held: dict[int, list[tuple[Rank, Message, Reply]]] = {}
        """Messages to shards that this rank is about to take over."""
        mine = [j for j in range(num_shards) if self._owner(j) == comm.rank]
        self.shards = {j: make_shard(j, initial(j)) for j in mine}
        comm.serve(channel, self.handle)
        comm.on_lost(self._on_lost)

    def handle(self, src: Rank, message: Message) -> Message | Reply | None:
        """Route one message by its operation."""
        operation, j = ServerOperation.of(src, message), int(message.header["shard"])
        if operation is ServerOperation.BACKUP:
            self._keep(j, ShardCopy.of(message))
            return None
        if operation is ServerOperation.COPY:
            return self._copy(j)
        shard = self.shards.get(j)
        if shard is None:  # the sender noticed a death before we did, or we are still rebuilding
            reply = self._comm.deferred()
            self._held.setdefault(j, []).append((src, message, reply))
            return reply
        if operation is ServerOperation.PEEK:
            return shard.snapshot()
        return self._exchange(shard, src, ShardExchange.of(message))

    def state_dict(self) -> dict[str, Any]:
        """All shards of this rank."""
        return {str(j): shard.state_dict() for j, shard in self.shards.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for j, saved in state.items():
            self.shards[int(j)].load_state_dict(saved)

    def _owner(self, j: int) -> Rank:
        return owner(j, self._num_shards, self._comm.size, self._view.lost)

    def _exchange(self, shard: Shard, src: Rank, exchange: ShardExchange) -> Message | Reply | None:
        """Let the shard handle an exchange, and those that a recording let wait for it."""
        j = exchange.shard
        if not self._recording.may_go(j, src, exchange.number):
            reply = self._comm.deferred()
            self._recording.hold(src, exchange, reply)
            return reply
        result = shard.exchange(src, exchange)
        self._back_up(j, shard)
        released = self._recording.released(j)
        if released and result is not None:  # its weights change before it is sent: here, or once it is set
            first = self._comm.deferred()
            _forward(result, first, is_copied=True)
            result = first
        for held in released:
            _forward(shard.exchange(held.src, held.exchange), held.reply)
            self._back_up(j, shard)
        return result

    def _back_up(self, j: int, shard: Shard) -> None:
        """Post a copy of the shard to the next living rank if it is time."""
        if not self._backup_every or shard.clock - self._backed_up.get(j, 0) < self._backup_every:
            return
        self._backed_up[j] = shard.clock
        size, rank = self._comm.size, self._comm.rank
        others = [(rank + step) % size for step in range(1, size)]
        target = next((other for other in others if other not in self._view.lost), None)
        if target is not None:
            copy = shard.copy()
            header: dict[str, int | str] = {
                "op": ServerOperation.BACKUP.value,
                "shard": j,
                "version": copy.version,
            }
            self._comm.post(target, self._channel, Message(header, [*copy.weights, copy.progress]))

    def _keep(self, j: int, backup: ShardCopy) -> None:
        if j not in self._backups or backup.version >= self._backups[j].version:
            self._backups[j] = backup

    def _copy(self, j: int) -> Message:
        """The freshest copy of a shard that this rank has, and how much of its own work was acknowledged."""
        best = own = self._remembered(j)
        backup = self._backups.get(j)
        if backup is not None and backup.version > best.version:
            best = backup
        header: dict[str, int | str] = {
            "version": best.version,
            "acknowledged": int(own.progress[0, self._comm.rank]),
            "state": self._view.presence.value,
        }
        return Message(header, [*best.weights, best.progress])

    def _on_lost(self, rank: Rank) -> None:
        if rank in self._view.lost:
            return
        orphans = [j for j in range(self._num_shards) if self._owner(j) == rank]
        self._view.lost.add(rank)
        for shard in self.shards.values():
            shard.leave(rank)
        for j in orphans:
            if self._owner(j) == self._comm.rank:
                self._rebuild(j)

    def _rebuild(self, j: int) -> None:
        """Ask every living rank for its copy; when all have answered (or died), take over."""
        peers = [rank for rank in range(self._comm.size) if rank not in self._view.lost]
        answers: dict[Rank, Message] = {}
        open_calls = set(peers)

        def arrived(peer: Rank, outcome: Message | BaseException) -> None:
            if isinstance(outcome, Message):
                answers[peer] = outcome
            open_calls.discard(peer)
            if not open_calls:
                self._take_over(j, answers)

        for peer in peers:
            request = Message({"op": ServerOperation.COPY.value, "shard": j})
            call = self._comm.call(peer, self._channel, request)
            call.then(lambda outcome, peer=peer: arrived(peer, outcome))  # type: ignore[misc]

    def _take_over(self, j: int, answers: dict[Rank, Message]) -> None:
        """Make the shard from the freshest copy, and handle what came for it meanwhile."""
        copies = {rank: ShardCopy.of(answer) for rank, answer in sorted(answers.items())}
        freshest = max(copies.values(), key=lambda copy: copy.version)
        shard = self._make_shard(j, freshest.weights)
        shard.restore(freshest.version, freshest.progress)
        for peer in copies:
            header = answers[peer].header
            shard.tally.lost += max(0, int(header["acknowledged"]) - int(freshest.progress[0, peer]))
            presence = Presence(header["state"])
            if presence is not Presence.TRAINING:
                shard.set_presence(peer, presence)
        for rank in sorted(self._view.lost):
            shard.leave(rank)
        self.shards[j] = shard
        for src, message, reply in self._held.pop(j, []):
            if src not in self._view.lost:
                _forward(self.handle(src, message), reply)


def _forward(result: Message | Reply | None, reply: Reply, *, is_copied: bool = False) -> None:
    """Set `reply` to what `result` is, or will be; to a copy of its tensors if `is_copied`."""

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
