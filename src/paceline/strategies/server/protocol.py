"""What workers and shards say to each other: the headers of the messages on one channel.

    operation   from → to              header                               tensors
    exchange    worker → shard         shard, number, version, push, pull,  the update's pieces, with `push`
                                       state
    peek        worker → shard         shard, number                        none
    copy        new owner → all ranks  shard                                none
    backup      owner → next rank      shard, version                       weights, progress

An exchange with `pull` and a peek are answered with version, counters and `encoded`, and with weights (or
payloads that change the worker's weights), progress and, once all workers have finished, staleness counts. A
copy is answered with version, acknowledged, state, and with weights and progress.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

from paceline.errors import ProtocolError
from paceline.types import Message, Rank


class ServerOperation(enum.Enum):
    """What a message asks for; the value is what travels."""

    EXCHANGE = "exchange"
    PEEK = "peek"
    COPY = "copy"
    BACKUP = "backup"

    @classmethod
    def of(cls, src: Rank, message: Message) -> ServerOperation:
        """Read the operation of a message; ProtocolError for one that does not exist."""
        text = message.header.get("op")
        try:
            return cls(text)
        except ValueError:
            raise ProtocolError(f"rank {src}: parameter_server has no operation {text!r}") from None


class Presence(enum.Enum):
    """Whether others may have to wait for a worker; the value is what travels."""

    TRAINING = ""
    RESTING = "rest"
    """It waits elsewhere for a while (evaluation, saving)."""
    FINISHED = "final"
    """It has pushed its last update and waits for the final weights."""


@dataclass(frozen=True)
class ShardExchange:
    """One worker's push, pull or both, at one shard."""

    shard: int
    number: int
    """The worker counts its exchanges, so that one that is sent again is recognised."""
    version: int
    """The shard's clock when the worker pulled the weights that the update was computed from."""
    is_push: bool
    is_pull: bool
    presence: Presence
    pieces: Sequence[torch.Tensor] = field(default=(), compare=False)
    """The update, or its payloads; empty when nothing has changed."""

    def message(self) -> Message:
        """Return the message that says this."""
        header: dict[str, int | str | bool] = {
            "op": ServerOperation.EXCHANGE.value,
            "shard": self.shard,
            "number": self.number,
            "version": self.version,
            "push": self.is_push,
            "pull": self.is_pull,
            "state": self.presence.value,
        }
        return Message(header, self.pieces)

    @classmethod
    def of(cls, message: Message) -> ShardExchange:
        """Read what `message` wrote."""
        header = message.header
        return cls(
            shard=int(header["shard"]),
            number=int(header["number"]),
            version=int(header["version"]),
            is_push=bool(header["push"]),
            is_pull=bool(header["pull"]),
            presence=Presence(header["state"]),
            pieces=message.tensors,
        )


@dataclass
class ShardCopy:
    """A shard's state as a rank remembers it, from a backup or from what it last pulled."""

    version: int
    weights: Sequence[torch.Tensor]
    progress: torch.Tensor
    """int64, shape (2, workers): exchange numbers seen, and clocks."""

    @classmethod
    def of(cls, message: Message) -> ShardCopy:
        """Read a backup, or the answer to a copy."""
        *weights, progress = message.tensors
        return cls(int(message.header["version"]), weights, progress)


@dataclass
class RankView:
    """What the client and the host of one rank tell each other, between worker and message service."""

    presence: Presence = Presence.TRAINING
    """This worker's presence, told to a rank that rebuilds a shard."""
    lost: set[Rank] = field(default_factory=set)
    """Ranks whose death the message service has noticed."""
