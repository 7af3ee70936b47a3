"""Which fabric carries a job's tensors: the native one for CPU tensors, torch's for the rest.

All ranks agree before they connect: each shows in the store what it was asked for and what it can do. Shared
memory that some rank may not open is replaced by TCP on the same host; only where the core cannot work at
all does the torch fabric stand in. Rank 0 says once what was replaced.
"""

from __future__ import annotations

import dataclasses
import warnings

import torch

from paceline import core
from paceline.comm.communicator import FabricCommunicator
from paceline.comm.rendezvous.meeting import Meeting
from paceline.errors import ConfigError, Mismatch

FABRICS = ("native", "torch")
_GPU_TIMEOUT_S = 600.0


@dataclasses.dataclass(frozen=True)
class Card:
    """What one rank shows the others."""

    wanted: str | None
    device: str
    problem: str
    """Why the native fabric cannot work in this process; "" if it can."""


def connect(
    meeting: Meeting, name: str | None = None, *, timeout_s: float, device: torch.device | None = None
) -> FabricCommunicator:
    """Join the job's ranks over fabric `name`; None: native for the CPU if every rank can, else torch.

    `timeout_s` bounds the wait for other ranks, and operations. Raises ConfigError for unknown names, and on
    every rank when "native" was asked for and one rank cannot; Mismatch when ranks want different fabrics,
    Timeout naming the ranks that did not come.
    """
    if name is not None and name not in FABRICS:
        raise ConfigError(f"unknown fabric {name!r}: {' or '.join(FABRICS)} expected")
    device = device or torch.device("cpu")
    own = Card(name, device.type, _problem(device) if name != "torch" else "")
    cards = [
        Card(**card) for card in meeting.exchange("fabric", dataclasses.asdict(own), timeout_s=timeout_s)
    ]
    for r, card in enumerate(cards):
        if card.wanted != cards[0].wanted:
            raise Mismatch(
                f"rank {meeting.rank}: rank 0 was started with fabric {cards[0].wanted or 'unset'}, rank {r}"
                f" with {card.wanted or 'unset'}; give every rank the same"
            )
    problems = [(r, card.problem) for r, card in enumerate(cards) if card.problem]
    if name == "native" and problems:
        raise ConfigError(f"the native fabric cannot work: rank {problems[0][0]}: {problems[0][1]}")
    if name == "torch" or problems:
        concerns_cpu_tensors = any(card.problem and card.device == "cpu" for card in cards)
        if concerns_cpu_tensors and meeting.rank == 0:
            warnings.warn(
                f"the torch fabric stands in for the native one: rank {problems[0][0]}: {problems[0][1]}",
                stacklevel=2,
            )
        from paceline.comm import torch_fabric

        return torch_fabric.connect(meeting, timeout_s=timeout_s, device=device)
    from paceline.comm.native import shared_memory, tuning
    from paceline.comm.native.network import NetworkCommunicator

    comm = shared_memory.connect(meeting, timeout_s=timeout_s, device=device)
    has_hosts = len(set(meeting.hosts)) > 1
    if isinstance(comm, NetworkCommunicator) and has_hosts and comm.size <= tuning.MOST_RANKS:
        tuning.adopt(comm)
    return comm


def for_device(comm: FabricCommunicator, device: torch.device) -> FabricCommunicator:
    """A communicator that moves tensors of `device`: `comm` itself, or one of the torch fabric beside it.

    Collective. The caller closes what is not `comm`.
    """
    if device.type == "cpu" or comm.fabric != "native" or comm.meeting is None:
        return comm
    from paceline.comm import torch_fabric

    # Its messages and its group have keys of their own in the store.
    meeting = comm.meeting.part(device.type, range(comm.size))
    return torch_fabric.connect(meeting, timeout_s=_GPU_TIMEOUT_S, device=device)


def _problem(device: torch.device) -> str:
    if device.type != "cpu":
        return f"it moves CPU tensors, not {device.type} ones"
    if core.missing:
        return core.missing
    try:
        from paceline.comm.native.communicator import engine

        engine()
    except ConfigError as error:
        return str(error)
    return ""
