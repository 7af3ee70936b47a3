"""P ranks of the native fabric in one process and one thread: thousands of cases in the time of few starts.

Every rank has an engine of its own, whose helper thread moves what nobody waits for; so one thread can
start an operation on all ranks and then wait for each. Tests across processes stand beside this.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from paceline import _core
from paceline.comm.native.hierarchical import HierarchicalCommunicator
from paceline.comm.native.network import NetworkCommunicator
from paceline.comm.native.shared_memory import SharedMemoryCommunicator


class World:
    """`comms[r]` is rank r. `hosts`: one letter for each rank, as "aab".

    `fabric` "shm": all share memory, whatever the hosts; "tcp": all talk over the network; "mixed": both.
    """

    def __init__(self, fabric: str, hosts: str, *, timeout_s: float = 60.0) -> None:
        self.hosts, self.size = hosts, len(hosts)
        self.engines = [_core.Engine() for _ in hosts]
        self._networks: list[_core.TcpTransport] = []
        self.timeout_s = timeout_s
        make = {"shm": self._shared, "tcp": self._network, "mixed": self._mixed}[fabric]
        self.comms: list[Any] = make()
        self.each(lambda comm: comm.barrier())

    def each(self, call: Callable[[Any], Any]) -> None:
        """Start `call` on every rank, then wait for the works that it returns."""
        works = [call(comm) for comm in self.comms]
        for work in works:
            if work is not None:
                work.wait()

    def close(self) -> None:
        for comm in self.comms:
            comm.close()
        for network in self._networks:
            network.close()
        for engine in self.engines:
            engine.stop()

    def __enter__(self) -> World:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _groups(self, ranks: list[int]) -> list[_core.SharedMemoryGroup]:
        groups = [
            _core.SharedMemoryGroup(self.engines[r], place, len(ranks)) for place, r in enumerate(ranks)
        ]
        addresses = [tuple(group.address) for group in groups]
        for group in groups:
            group.connect(addresses)
        return groups

    def _shared(self) -> list[Any]:
        groups = self._groups(list(range(self.size)))
        hosts = ["h"] * self.size
        return [SharedMemoryCommunicator(r, hosts, g, timeout_s=self.timeout_s) for r, g in enumerate(groups)]

    def _network(self) -> list[Any]:
        self._networks = [
            _core.TcpTransport(engine, r, self.size, b"secret", b"session", "", "127.0.0.1")
            for r, engine in enumerate(self.engines)
        ]
        endpoints = [n.endpoints for n in self._networks]
        for network in self._networks:
            network.set_peers(endpoints)
        return [
            NetworkCommunicator(
                r, self.hosts, network, list(range(self.size)), ids=[0], timeout_s=self.timeout_s
            )
            for r, network in enumerate(self._networks)
        ]

    def _mixed(self) -> list[Any]:
        worlds = self._network()
        names = list(dict.fromkeys(self.hosts))
        hosts = [names.index(h) for h in self.hosts]
        members = [[r for r in range(self.size) if hosts[r] == h] for h in range(len(names))]
        num_stripes = min(map(len, members))
        local = {r: g for ranks in members for r, g in zip(ranks, self._groups(ranks), strict=True)}
        comms = []
        for r, world in enumerate(worlds):
            place = members[hosts[r]].index(r)
            stripe = world.stripe_group([m[place] for m in members]) if place < num_stripes else None
            comms.append(HierarchicalCommunicator(world, hosts, local[r], stripe))
        return comms
