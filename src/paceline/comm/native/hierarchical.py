"""The native fabric on several hosts with several ranks each: shared memory within, TCP between."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from paceline import _core
from paceline.comm.ledger import Ledger
from paceline.comm.native.choice import Choice, check_operation
from paceline.comm.native.communicator import NativeCommunicator, engine
from paceline.comm.native.network import NetworkCommunicator
from paceline.errors import ConfigError
from paceline.types import Rank, ReduceOp


def with_shared_memory(
    world: NetworkCommunicator, *, ledger: Ledger | None = None
) -> NetworkCommunicator | HierarchicalCommunicator:
    """`world` with shortcuts through the memory of hosts that it has several ranks on. Collective.

    Where ranks of a host may not open each other's memory, all stay with TCP.
    """
    names = list(dict.fromkeys(world.hosts))
    hosts = [names.index(h) for h in world.hosts]
    members = [[r for r in range(world.size) if hosts[r] == h] for h in range(len(names))]
    if all(len(m) == 1 for m in members):
        return world
    mine = members[hosts[world.rank]]
    place = mine.index(world.rank)
    core = engine()
    core.set_ranks_on_host(len(mine))
    local = _core.SharedMemoryGroup(core, place, len(mine))
    everyone = torch.empty(5 * world.size, dtype=torch.int64)
    world.all_gather(everyone, torch.tensor(local.address, dtype=torch.int64)).wait()
    rows = everyone.view(world.size, 5).tolist()
    failed = torch.zeros(1, dtype=torch.int64)
    try:
        local.connect([tuple(rows[r]) for r in mine])
    except ConfigError:
        failed += 1
    world.all_reduce(failed, op=ReduceOp.MAX).wait()
    if failed.item():
        local.close()
        return world
    num_stripes = min(len(m) for m in members)
    stripe = world.stripe_group([m[place] for m in members]) if place < num_stripes else None
    return HierarchicalCommunicator(world, hosts, local, stripe, ledger=ledger)


class HierarchicalCommunicator(NativeCommunicator):
    """A communicator over the hosts' shared memory and a network; owns `world`, `local` and `stripe`."""

    def __init__(
        self,
        world: NetworkCommunicator,
        hosts: Sequence[int],
        local: _core.SharedMemoryGroup,
        stripe: _core.NetworkGroup | None,
        *,
        ledger: Ledger | None = None,
    ) -> None:
        self._world, self._local, self._stripe = world, local, stripe
        group = _core.HierarchicalGroup(world.rank, hosts, local, world.network_group, stripe)
        super().__init__(world.rank, world.hosts, group, timeout_s=world.timeout_s, ledger=ledger)
        self.meeting = world.meeting

    def explain(self, operation: str, num_bytes: int, *, buffers: str = "private") -> Choice:
        """Which algorithm `operation` gets for a buffer of `num_bytes`, why, and the runner-up."""
        check_operation(operation)
        why = "ranks of one host share memory: every byte crosses the network once between two hosts"
        if operation in ("gather", "scatter", "all_to_all", "all_to_all_v"):
            why = "straight to every rank: through shared memory within the host, over TCP to the others"
        return Choice(operation, num_bytes, "hierarchical", why, "direct")

    def check_algorithm(self, operation: str, algorithm: str) -> None:
        """Refused: where hosts have several ranks, the hierarchy is fixed."""
        raise ConfigError(
            f"{self.who()}: {operation}: algorithm={algorithm!r}: hosts with several ranks use the hierarchy"
            " of shared memory and TCP (see explain); algorithms can be chosen where every host has one rank"
        )

    def make_urgent_lane(self) -> NativeCommunicator:
        return with_shared_memory(self._world.make_urgent_lane(), ledger=self.ledger)

    @property
    def wire_bytes(self) -> int:
        """Bytes that this process put on the network."""
        return self._world.wire_bytes

    def make_part(self, ranks: list[Rank]) -> NetworkCommunicator | HierarchicalCommunicator | None:
        part = self._world.make_part(ranks)
        return None if part is None else with_shared_memory(part)

    def release(self) -> None:
        self.ledger.wire_bytes = self.wire_bytes
        super().release()
        self._local.close()
        if self._stripe is not None:
            self._stripe.close()
        self._world.close()
