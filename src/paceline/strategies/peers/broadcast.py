"""One worker's tensors to all others, asynchronously: directly, or relayed over a mesh of bounded degree.

Relayed, worker r sends only to r + 1, r + 2, r + 4, … (modulo N). A worker at distance d from the origin
passes a message on to the distances d + 2^j for all 2^j > d: a binomial tree for every origin, with log₂N
neighbours and log₂N hops.
"""

from __future__ import annotations

import torch

from paceline.errors import PeerLost, ProtocolError
from paceline.types import Communicator, Message, Rank


class PeerBroadcast:
    """Sends to all peers, and keeps what they sent until `take`.

    Args:
        comm: The ranks; each must make one with the same arguments.
        channel: Name of the message channel.
        is_relayed: Pass messages on over log₂N neighbours instead of sending to all N − 1 peers.
    """

    def __init__(self, comm: Communicator, channel: str, *, is_relayed: bool) -> None:
        self._comm, self._channel = comm, channel
        self.is_relayed = is_relayed
        self.lost: set[Rank] = set()
        self._inbox: list[tuple[Rank, list[torch.Tensor]]] = []
        comm.serve(channel, self._handle)
        comm.on_lost(self.lost.add)

    def send(self, tensors: list[torch.Tensor]) -> None:
        """Post `tensors` to all peers; does not wait until they have arrived."""
        self._post(tensors, origin=self._comm.rank)

    def take(self, count: int) -> list[list[torch.Tensor]]:
        """Return what arrived since the last call, in order; ProtocolError unless `count` tensors each."""
        inbox, self._inbox = self._inbox, []
        for origin, tensors in inbox:
            if len(tensors) != count:
                raise ProtocolError(f"rank {origin}: {count} payloads expected, got {len(tensors)}")
        return [tensors for _, tensors in inbox]

    def drain(self) -> None:
        """Collective: everything that was sent has arrived everywhere, relays included."""
        for _ in range(self._comm.size.bit_length() if self.is_relayed else 1):
            self._comm.drain()

    def _post(self, tensors: list[torch.Tensor], *, origin: Rank) -> None:
        """Post to all peers; relayed, to those that this rank serves in the origin's tree."""
        size = self._comm.size
        steps = list(range(1, size))
        if self.is_relayed:
            distance = (self._comm.rank - origin) % size
            powers = [1 << j for j in range(size.bit_length())]
            steps = [power for power in reversed(powers) if power > distance and distance + power < size]
        for step in steps:
            peer = (self._comm.rank + step) % size
            if peer in self.lost:
                continue
            try:
                self._comm.post(peer, self._channel, Message({"origin": origin}, tensors))
            except PeerLost:  # it died while this waited for room, or just now: its callback is still to run
                self.lost.add(peer)

    def _handle(self, src: Rank, message: Message) -> None:
        """On the message service: pass on, and keep for the worker."""
        origin, tensors = int(message.header["origin"]), list(message.tensors)
        if self.is_relayed:
            self._post(tensors, origin=origin)
        self._inbox.append((origin, tensors))
