"""Which rank is this process? The answer comes from the environment variables of its launcher.

Launchers are tried in this order: torchrun and `paceline run`, Open MPI, MPICH and Intel MPI (Hydra), Slurm's
srun. Inner launchers come first, because their processes inherit the variables of outer ones. Without any of
them the process is a job of its own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from paceline.comm.rendezvous import hostlist
from paceline.errors import ConfigError
from paceline.user_input import digits, shortened


@dataclasses.dataclass(frozen=True)
class ProcessIdentity:
    """Which process of a job this one is, and where the job meets."""

    rank: int
    size: int
    local_rank: int
    """Rank among the processes of this host."""
    local_size: int
    """Number of processes on this host."""
    launcher: str
    """"torchrun", "openmpi", "mpich", "slurm", "torch.distributed" or "alone"."""
    master_address: str | None = None
    """Name or address of rank 0's host, if the launcher says it."""
    master_port: int | None = None


def who_am_i(environment: Mapping[str, str]) -> ProcessIdentity:
    """Read the identity of this process; ConfigError names the variable that is missing or not a number."""
    if "RANK" in environment and "WORLD_SIZE" in environment:
        identity = _read(environment, "torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    elif "OMPI_COMM_WORLD_RANK" in environment:
        identity = _read(
            environment,
            "openmpi",
            "OMPI_COMM_WORLD_RANK",
            "OMPI_COMM_WORLD_SIZE",
            "OMPI_COMM_WORLD_LOCAL_RANK",
            "OMPI_COMM_WORLD_LOCAL_SIZE",
        )
    elif "PMI_RANK" in environment and "PMI_SIZE" in environment:
        identity = _read(environment, "mpich", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
    elif "SLURM_PROCID" in environment and _number(environment, "SLURM_STEP_NUM_TASKS", 1) > 1:
        # Inside a batch script SLURM_NTASKS counts the whole job although one process runs: read the step's.
        identity = _read(
            environment, "slurm", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS"
        )
        identity = _slurm_master(environment, identity)
    else:
        return ProcessIdentity(0, 1, 0, 1, "alone")
    if "MASTER_ADDR" in environment:
        identity = dataclasses.replace(identity, master_address=environment["MASTER_ADDR"])
    if "MASTER_PORT" in environment:
        identity = dataclasses.replace(identity, master_port=_number(environment, "MASTER_PORT", 0))
    return identity


def _read(
    environment: Mapping[str, str], launcher: str, rank: str, size: str, local_rank: str, local_size: str
) -> ProcessIdentity:
    """The identity from the four variables with these names."""
    identity = ProcessIdentity(
        _number(environment, rank, None),
        _number(environment, size, None),
        _number(environment, local_rank, 0),
        _number(environment, local_size, 1),
        launcher,
    )
    if not 0 <= identity.rank < identity.size:
        raise ConfigError(
            f"{launcher} says {rank}={identity.rank} and {size}={identity.size}:"
            " a rank below the size expected"
        )
    return identity


def _number(environment: Mapping[str, str], name: str, default: int | None) -> int:
    text = environment.get(name)
    if text is None and default is not None:
        return default
    number = digits((text or "").strip().removeprefix("-"))
    if number is None:
        raise ConfigError(
            f"environment variable {name}: a whole number expected, got {shortened(text or '')}"
        )
    return -number if (text or "").strip().startswith("-") else number


def _slurm_master(environment: Mapping[str, str], identity: ProcessIdentity) -> ProcessIdentity:
    """Add where to meet: the step's first host, and a port computed from the job's and the step's id."""
    nodes = hostlist.expand(
        environment.get("SLURM_STEP_NODELIST")
        or environment.get("SLURM_JOB_NODELIST")
        or environment.get("SLURM_NODELIST")
        or "localhost"
    )
    counts = hostlist.expand_counts(environment.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    node = _number(environment, "SLURM_NODEID", 0)
    if not nodes or node < 0:
        raise ConfigError(
            f"slurm says SLURM_NODEID={node} and a list of {len(nodes)} hosts: a number from 0 up and"
            " at least one host expected"
        )
    local_size = counts[min(node, len(counts) - 1)]
    step = environment.get("SLURM_STEP_ID", "0")
    job = _number(environment, "SLURM_JOB_ID", 0) * 31 + (digits(step) or 0)
    return dataclasses.replace(
        identity, master_address=nodes[0], master_port=20000 + job % 20000, local_size=local_size
    )
