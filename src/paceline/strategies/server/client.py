"""The worker's side of the parameter server: what it has pulled, what it has not pushed yet, and to whom."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from paceline import local_work
from paceline.codecs.kernel.codec import Codec
from paceline.errors import PeerLost
from paceline.strategies.base.slices import Slices
from paceline.strategies.server.encoding import PushEncoder
from paceline.strategies.server.ownership import owner
from paceline.strategies.server.protocol import (
    Presence,
    RankView,
    ServerOperation,
    ShardCopy,
    ShardExchange,
)
from paceline.types import Communicator, Message, Rank, Reply


@dataclass
class _PendingCall:
    """A call to a shard, kept so that it can be made again to the next owner."""

    message: Message
    target: Rank
    reply: Reply


class ShardClient:
    """Pushes to and pulls from all shards at once. The flat parameters are changed in place.

    Args:
        comm: The ranks that host the shards.
        flats: The worker's flat parameters.
        slices: How they are cut into shards.
        channel: Where the hosts of the shards listen.
        view: Shared with this rank's host.
        push_every: Minibatches between two pushes.
        pull_every: Minibatches between two pulls.
        prefetch: Use the answer to a pull at the next one, without waiting for it now.
        sends_gradients: Push gradients instead of the changes that the local optimizer made.
        codec: Encodes both ways; None sends updates and weights uncompressed.
    """

    def __init__(
        self,
        comm: Communicator,
        flats: Sequence[torch.Tensor],
        slices: Slices,
        *,
        channel: str,
        view: RankView,
        push_every: int,
        pull_every: int,
        prefetch: bool,
        sends_gradients: bool,
        codec: Codec | None,
    ) -> None:
        self._comm, self._flats, self._slices, self._channel = comm, flats, slices, channel
        self._num_shards, self._view = len(slices), view
        self._push_every, self._pull_every, self._prefetch = push_every, pull_every, prefetch
        self._sends_gradients = sends_gradients
        self._codec = codec
        self.pushes = None if codec is None else PushEncoder(codec, comm.rank)
        self._base = [flat.clone() for flat in flats]
        """The weights from which the update that is not pushed yet is counted."""
        self._gradients: list[torch.Tensor] | None = None
        self._pulled = [flat.clone() for flat in flats]
        self._progress = [torch.zeros(2, comm.size, dtype=torch.int64) for _ in range(len(slices))]
        self._versions = [0] * len(slices)
        """Each shard's clock at the last pull."""
        self._number = 0
        self._steps = 0
        self._ahead: list[_PendingCall] | None = None
        """With `prefetch`: the calls whose answers the next pull takes."""
        self._lost: set[Rank] = set()
        """Ranks whose death a call has noticed."""
        self._own_pushes = 0
        self.staleness = 0.0
        """Updates by others that the last pull brought; mean over the shards."""

    def remembered(self, shard: int) -> ShardCopy:
        """Return the shard's state as last pulled: asked for when its owner died."""
        weights = self._slices.of(self._pulled, shard)
        return ShardCopy(self._versions[shard], weights, self._progress[shard])

    def add_gradients(self, gradients: Sequence[torch.Tensor], weight: float) -> None:
        """Accumulate the mean gradient of this worker's own samples; `gradients` are `weight` times that."""
        if weight > 0:
            own = [gradient / weight for gradient in gradients]
            local_work.charge_passes(self._flats, 1 if self._gradients is None else 2)
            if self._gradients is not None:
                torch._foreach_add_(own, self._gradients)
            self._gradients = own

    def step(self) -> None:
        """Exchange with the shards if it is time: one more minibatch is done."""
        self._steps += 1
        self._view.presence = Presence.TRAINING
        push, pull = self._steps % self._push_every == 0, self._steps % self._pull_every == 0
        if not (push or pull):
            return
        calls = self._exchange(push=push, pull=pull, presence=Presence.TRAINING)
        if not pull:
            return
        if self._prefetch:
            calls, self._ahead = self._ahead or [], calls
            if not calls:
                return
        self._install(self._await(calls))

    def finish(self) -> list[Message]:
        """Push what is left, wait until all workers have finished, and take the final weights."""
        self._view.presence = Presence.FINISHED
        if self._ahead is not None:
            self._install(self._await(self._ahead))
            self._ahead = None
        answers = self._await(self._exchange(push=True, pull=True, presence=Presence.FINISHED))
        self._install(answers)
        return answers

    def rest(self) -> None:
        """Tell all shards that no worker needs to wait for this one until it comes back."""
        self._view.presence = Presence.RESTING
        self._await(self._exchange(push=False, pull=False, presence=Presence.RESTING))

    def peek(self) -> list[torch.Tensor]:
        """Return the shards' weights now, as new flat tensors."""
        flats = [flat.clone() for flat in self._flats]
        calls = []
        for j in range(self._num_shards):
            header: dict[str, int | str] = {"op": ServerOperation.PEEK.value, "shard": j, "number": 0}
            calls.append(self._call(j, Message(header)))
        for j, answer in enumerate(self._await(calls)):
            for view, weights in zip(self._slices.of(flats, j), answer.tensors, strict=False):
                view.copy_(weights)
        return flats

    def _exchange(self, *, push: bool, pull: bool, presence: Presence) -> list[_PendingCall]:
        """Call all shards; the answers come in the order of shards."""
        update = self._take_update() if push else None
        is_last = presence is not Presence.TRAINING and not self._sends_gradients
        if is_last and update is not None and not any(bool(piece.any()) for piece in update):
            update, push = None, False  # nothing is left: the shards' clocks need not tick
        self._number += 1
        self._own_pushes += push
        calls = []
        for j in range(self._num_shards):
            pieces = self._slices.of(update, j) if update else []
            if self.pushes is not None:
                pieces = self.pushes.encode(j, pieces)
            exchange = ShardExchange(j, self._number, self._versions[j], push, pull, presence, pieces)
            calls.append(self._call(j, exchange.message()))
        return calls

    def _take_update(self) -> list[torch.Tensor] | None:
        """What has not been pushed: it counts as pushed now. None without a gradient."""
        if self._sends_gradients:
            gradients, self._gradients = self._gradients, None
            return gradients
        update = self._unpushed()
        local_work.charge_passes(self._flats, 2)
        torch._foreach_copy_(self._base, list(self._flats))
        return update

    def _unpushed(self) -> list[torch.Tensor]:
        return [flat - base for flat, base in zip(self._flats, self._base, strict=True)]

    def _call(self, shard: int, message: Message) -> _PendingCall:
        """Call the living owner of a shard."""
        while True:
            target = owner(shard, self._num_shards, self._comm.size, self._lost | self._view.lost)
            try:
                return _PendingCall(message, target, self._comm.call(target, self._channel, message))
            except PeerLost:
                self._lost.add(target)

    def _await(self, calls: list[_PendingCall]) -> list[Message]:
        """Answers in the order of calls; a call whose target dies goes to the shard's next owner."""
        answers = []
        for call in calls:
            pending = call
            while True:
                try:
                    answers.append(pending.reply.wait())
                    break
                except PeerLost:
                    self._lost.add(pending.target)
                    pending = self._call(int(pending.message.header["shard"]), pending.message)
        return answers

    def _install(self, answers: list[Message]) -> None:
        """Take pulled weights, and keep on top of them what has not been pushed."""
        gaps = [int(a.header["version"]) - v for a, v in zip(answers, self._versions, strict=True)]
        self.staleness = sum(max(0, gap - self._own_pushes) for gap in gaps) / max(1, len(gaps))
        self._own_pushes = 0
        unpushed = self._unpushed()
        local_work.charge_passes(self._flats, 5)  # this difference, is it zero, and three copies
        # With gradients, local steps only stand in for the shards' optimizer: they are overwritten.
        is_clean = self._sends_gradients or not any(bool(piece.any()) for piece in unpushed)
        for j, answer in enumerate(answers):
            pieces = self._slices.of(self._pulled, j)
            for view, weights in zip(pieces, answer.tensors, strict=False):
                if answer.header.get("encoded"):
                    assert self._codec is not None
                    self._codec.decode(weights, view, accumulate=True)
                else:
                    view.copy_(weights)
            self._progress[j] = answer.tensors[len(pieces)]
            self._versions[j] = int(answer.header["version"])
        for flat, base, pulled, own in zip(self._flats, self._base, self._pulled, unpushed, strict=True):
            base.copy_(pulled)
            flat.copy_(pulled if is_clean else pulled + own)

    def state_dict(self) -> dict[str, Any]:
        """Everything a continued run needs on this worker."""
        answers = self._await(self._ahead or [])
        return {
            "ahead": [[dict(answer.header), list(answer.tensors)] for answer in answers],
            "residuals": {} if self.pushes is None else self.pushes.states,
            "base": self._base,
            "pulled": self._pulled,
            "versions": list(self._versions),
            "number": self._number,
            "steps": self._steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for own, saved in zip([*self._base, *self._pulled], [*state["base"], *state["pulled"]], strict=True):
            own.copy_(saved)
        self._versions = list(state["versions"])
        self._number, self._steps = state["number"], state["steps"]
        self._ahead = None
        if self.pushes is not None:
            self.pushes.states = dict(state["residuals"])
        for header, tensors in state["ahead"]:
            reply = self._comm.deferred()
            reply.set(Message(header, tensors))
            self._ahead = [*(self._ahead or []), _PendingCall(Message(), self._comm.rank, reply)]
