"""The user's handle on a distributed training job."""

from __future__ import annotations

import os
from typing import Any

import torch

from paceline import registry
from paceline.comm.communicator import FabricCommunicator
from paceline.comm.rendezvous import Meeting, meet
from paceline.options import JobOptions

DEFAULT_FABRIC = "torch"


def init(
    *,
    fabric: str | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    progress: bool | None = None,
    seed: int | None = None,
    timeout_s: float = 600.0,
    host: str | None = None,
) -> Job:
    """Join the job that this process was started for, or be a job of one.

    Works under `paceline run`, torchrun, mpirun, srun, and alone. Options of the command line win over these.
    """
    options = JobOptions.from_environment(os.environ)
    meeting = meet(secret=options.secret, host=host, timeout_s=timeout_s)
    name = options.fabric or fabric or DEFAULT_FABRIC
    module = registry.load("paceline.comm", name, kind="fabric")
    return Job(module.connect(meeting, timeout_s=timeout_s), options, meeting=meeting)


class Job:
    """P workers that train together."""

    def __init__(
        self, comm: FabricCommunicator, options: JobOptions, *, meeting: Meeting | None = None
    ) -> None:
        self.comm = comm
        self.options = options
        self.meeting = meeting
        self.rank = comm.rank
        self.size = comm.size
        self.is_main = comm.rank == 0

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.comm.barrier().wait()

    def print(self, *values: Any, **keywords: Any) -> None:
        """`print` on rank 0 only."""
        if self.is_main:
            print(*values, **keywords)

    def unwrap(self, model: torch.nn.Module) -> torch.nn.Module:
        """The user's own module under what torch.compile put around it."""
        inner: torch.nn.Module = getattr(model, "_orig_mod", model)
        return inner

    def close(self) -> None:
        """Leave the job."""
        self.comm.close()
