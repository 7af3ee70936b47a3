"""The worker's side of the parameter server: what it has pulled, what it has not pushed yet, and to whom."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from paceline.codecs.kernel.codec import Codec
from paceline.errors import PeerLost
from paceline.strategies.server.encoding import Pushes
from paceline.strategies.server.host import CHANNEL, Copy, ShardHost
from paceline.strategies.server.slices import Slices, owner
from paceline.types import Communicator, Message, Rank, Reply


@dataclass
class Request:
    """A call to a shard, kept so that it can be made again to the next owner."""

    message: Message
    target: Rank
    reply: Reply


class Sender:
    """Pushes and pulls all shards at once. The flat parameters are changed in place."""

    def __init__(
        self,
        slices: Slices,
        flats: Sequence[torch.Tensor],
        num_shards: int,
        comm: Communicator,
        codec: Codec | None = None,
    ) -> None:
        self._codec, self.pushes = codec, None if codec is None else Pushes(codec)
        self._slices, self._flats, self._num_shards, self._comm = slices, flats, num_shards, comm
        self._base = [f.clone() for f in flats]
        """What the unpushed update is counted from."""
        self._gradients: list[torch.Tensor] | None = None
        self._pulled = [f.clone() for f in flats]
        self._progress = [torch.zeros(2, comm.size, dtype=torch.int64) for _ in range(num_shards)]
        self._versions = [0] * num_shards
        self._next_versions = [0] * num_shards
        self._number = self._steps = 0
        self._ahead: list[Request] | None = None
        self._keeps_unpushed = True
        self._lost: set[Rank] = set()
        self._own_pushes = 0
        self.staleness = 0.0
        """Updates by others that the last pull brought; mean over the shards."""

    def remembered(self, shard: int) -> Copy:
        """The shard's state as last pulled (asked for when its owner died)."""
        weights = self._slices.of(self._pulled, shard)
        return Copy(self._next_versions[shard], weights, self._progress[shard])

    def add_gradients(self, gradients: Sequence[torch.Tensor], weight: float) -> None:
        """Accumulate the mean gradient of this worker's own samples."""
        if weight > 0:
            own = [g / weight for g in gradients]
            if self._gradients is not None:
                torch._foreach_add_(own, self._gradients)
            self._gradients = own

    def step(
        self,
        host: ShardHost,
        push_every: int,
        pull_every: int,
        prefetch: bool,
        *,
        sends_gradients: bool,
    ) -> None:
        """One minibatch is done: exchange with the shards if it is time."""
        self._steps += 1
        host.state = ""
        push, pull = self._steps % push_every == 0, self._steps % pull_every == 0
        if not (push or pull):
            return
        requests = self._send(host, push=push, pull=pull, state="", sends_gradients=sends_gradients)
        if not pull:
            return
        if prefetch:
            requests, self._ahead = self._ahead or [], requests
            if not requests:
                return
        self._install(self._await(host, requests))

    def finish(self, host: ShardHost, *, sends_gradients: bool) -> list[Message]:
        """Push the rest, wait for everybody, take the final weights."""
        host.state = "final"
        if self._ahead is not None:
            self._install(self._await(host, self._ahead))
            self._ahead = None
        requests = self._send(host, push=True, pull=True, state="final", sends_gradients=sends_gradients)
        answers = self._await(host, requests)
        self._install(answers)
        return answers

    def rest(self, host: ShardHost) -> None:
        """Tell all shards that this worker holds nobody up for a while."""
        host.state = "rest"
        self._await(
            host,
            self._send(host, push=False, pull=False, state="rest", sends_gradients=not self._keeps_unpushed),
        )

    def peek(self, host: ShardHost) -> list[torch.Tensor]:
        """The shards' weights now, as flat tensors."""
        flats = [f.clone() for f in self._flats]
        asked = [Message({"op": "peek", "shard": j, "number": 0}) for j in range(self._num_shards)]
        answers = self._await(host, [self._call(host, message) for message in asked])
        for j, answer in enumerate(answers):
            for view, weights in zip(self._slices.of(flats, j), answer.tensors, strict=False):
                view.copy_(weights)
        return flats

    def _send(
        self, host: ShardHost, *, push: bool, pull: bool, state: str, sends_gradients: bool
    ) -> list[Request]:
        update: list[torch.Tensor] | None = None
        if push and sends_gradients:
            update, self._gradients = self._gradients, None
        elif push:
            update = [f - b for f, b in zip(self._flats, self._base, strict=True)]
            for base, flat in zip(self._base, self._flats, strict=True):
                base.copy_(flat)
            if state and not any(bool(u.any()) for u in update):
                update, push = None, False  # nothing is left: the shards' clocks need not tick
        self._keeps_unpushed = not sends_gradients  # local steps only stand in for the shards' optimizer
        self._number += 1
        self._own_pushes += push
        requests = []
        for j in range(self._num_shards):
            header: dict[str, int | str | bool] = {
                "op": "exchange",
                "shard": j,
                "number": self._number,
                "version": self._versions[j],
                "push": push,
                "pull": pull,
                "state": state,
            }
            pieces = self._slices.of(update, j) if update else []
            if self.pushes is not None:
                pieces = self.pushes.encode(j, pieces)
            requests.append(self._call(host, Message(header, pieces)))
        return requests

    def _call(self, host: ShardHost, message: Message) -> Request:
        while True:
            lost = self._lost | host.lost
            target = owner(int(message.header["shard"]), self._num_shards, self._comm.size, lost)
            try:
                return Request(message, target, self._comm.call(target, CHANNEL, message))
            except PeerLost:
                self._lost.add(target)

    def _await(self, host: ShardHost, requests: list[Request]) -> list[Message]:
        """Answers in the order of shards; a request whose owner dies goes to the next owner."""
        answers = []
        for request in requests:
            while True:
                try:
                    answers.append(request.reply.wait())
                    break
                except PeerLost:
                    self._lost.add(request.target)
                    request = self._call(host, request.message)
        return answers

    def _install(self, answers: list[Message]) -> None:
        """Take pulled weights, and keep on top of them what has not been pushed."""
        gaps = [int(a.header["version"]) - v for a, v in zip(answers, self._versions, strict=True)]
        self.staleness = sum(max(0, gap - self._own_pushes) for gap in gaps) / max(1, len(gaps))
        self._own_pushes = 0
        unpushed = [f - b for f, b in zip(self._flats, self._base, strict=True)]
        is_clean = not self._keeps_unpushed or not any(bool(u.any()) for u in unpushed)
        for j, answer in enumerate(answers):
            pieces = self._slices.of(self._pulled, j)
            for view, weights in zip(pieces, answer.tensors, strict=False):
                if answer.header.get("encoded"):
                    assert self._codec is not None
                    self._codec.decode(weights, view, accumulate=True)
                else:
                    view.copy_(weights)
            self._progress[j] = answer.tensors[len(pieces)]
            self._next_versions[j] = self._versions[j] = int(answer.header["version"])
        for flat, base, pulled, rest in zip(self._flats, self._base, self._pulled, unpushed, strict=True):
            base.copy_(pulled)
            flat.copy_(pulled if is_clean else pulled + rest)

    def state_dict(self) -> dict[str, Any]:
        """Everything a continued run needs on this worker."""
        ahead = [[dict(m.header), list(m.tensors)] for m in (r.reply.wait() for r in self._ahead or [])]
        return {
            "ahead": ahead,
            "residuals": {} if self.pushes is None else self.pushes.states,
            "base": self._base,
            "pulled": self._pulled,
            "versions": list(self._versions),
            "number": self._number,
            "steps": self._steps,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`."""
        for own, saved in zip([*self._base, *self._pulled], [*state["base"], *state["pulled"]], strict=True):
            own.copy_(saved)
        self._versions, self._next_versions = list(state["versions"]), list(state["versions"])
        self._number, self._steps = state["number"], state["steps"]
        self._ahead = None
        if self.pushes is not None:
            self.pushes.states = dict(state["residuals"])
        for header, tensors in state["ahead"]:
            reply = self._comm.deferred()
            reply.set(Message(header, tensors))
            self._ahead = [*(self._ahead or []), Request(Message(), self._comm.rank, reply)]
