"""Who am I? Rank and size from whatever started this process: a pure function of its environment.

Asked in this order, because an outer launcher's variables are inherited by inner ones: torchrun and
`paceline run`, Open MPI, MPICH and Intel MPI (Hydra), Slurm's srun; otherwise this process is alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from paceline.comm.rendezvous import hostlist
from paceline.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Placement:
    """One process's place in a job."""

    rank: int
    size: int
    local_rank: int
    local_size: int
    launcher: str
    """"torchrun", "openmpi", "mpich", "slurm" or "alone"."""
    master_address: str | None = None
    master_port: int | None = None


def who_am_i(environment: Mapping[str, str]) -> Placement:
    """Read the place of this process; ConfigError names the variable that is missing or not a number."""
    if "RANK" in environment and "WORLD_SIZE" in environment:
        place = _read(environment, "torchrun", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    elif "OMPI_COMM_WORLD_RANK" in environment:
        names = [f"OMPI_COMM_WORLD_{n}" for n in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE")]
        place = _read(environment, "openmpi", *names)
    elif "PMI_RANK" in environment and "PMI_SIZE" in environment:
        place = _read(environment, "mpich", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS")
    elif "SLURM_PROCID" in environment and _number(environment, "SLURM_STEP_NUM_TASKS", 1) > 1:
        # Inside a batch script SLURM_NTASKS is the whole job's although one process runs: ask for the step's.
        place = _read(
            environment, "slurm", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_TASKS"
        )
        place = _slurm_master(environment, place)
    else:
        return Placement(0, 1, 0, 1, "alone")
    if "MASTER_ADDR" in environment:
        place = dataclasses.replace(place, master_address=environment["MASTER_ADDR"])
    if "MASTER_PORT" in environment:
        place = dataclasses.replace(place, master_port=_number(environment, "MASTER_PORT", 0))
    return place


def _read(
    environment: Mapping[str, str], launcher: str, rank: str, size: str, local_rank: str, local_size: str
) -> Placement:
    place = Placement(
        _number(environment, rank, None),
        _number(environment, size, None),
        _number(environment, local_rank, 0),
        _number(environment, local_size, 1),
        launcher,
    )
    if not 0 <= place.rank < place.size:
        raise ConfigError(
            f"{launcher} says {rank}={place.rank} and {size}={place.size}: a rank below the size expected"
        )
    return place


def _number(environment: Mapping[str, str], name: str, default: int | None) -> int:
    text = environment.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        raise ConfigError(f"environment variable {name}: a whole number expected, got {text!r}") from None


def _slurm_master(environment: Mapping[str, str], place: Placement) -> Placement:
    """Rank 0 is a task of the first host; the port is the same for all tasks of a step, and only for them."""
    nodes = hostlist.expand(
        environment.get("SLURM_STEP_NODELIST")
        or environment.get("SLURM_JOB_NODELIST")
        or environment.get("SLURM_NODELIST")
        or "localhost"
    )
    counts = hostlist.expand_counts(environment.get("SLURM_STEP_TASKS_PER_NODE", "1"))
    node = _number(environment, "SLURM_NODEID", 0)
    local = counts[min(node, len(counts) - 1)]
    step = environment.get("SLURM_STEP_ID", "0")
    job = _number(environment, "SLURM_JOB_ID", 0) * 31 + (int(step) if step.isdigit() else 0)
    return dataclasses.replace(
        place, master_address=nodes[0], master_port=20000 + job % 20000, local_size=local
    )
