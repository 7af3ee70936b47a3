"""Who am I, for every launcher; and where ranks meet."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch.distributed as dist

from paceline.comm.rendezvous import meeting
from paceline.comm.rendezvous.environment import ProcessIdentity, who_am_i
from paceline.comm.rendezvous.meeting import host_identity, meet
from paceline.errors import ConfigError

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "a",
    "MASTER_PORT": "29500",
}
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}
HYDRA = {"PMI_RANK": "2", "PMI_SIZE": "3", "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "1"}
SLURM = {
    "SLURM_PROCID": "5",
    "SLURM_NTASKS": "6",
    "SLURM_STEP_NUM_TASKS": "6",
    "SLURM_LOCALID": "2",
    "SLURM_STEP_TASKS_PER_NODE": "3(x2)",
    "SLURM_STEP_NODELIST": "node[07-08]",
    "SLURM_JOB_ID": "9",
    "SLURM_STEP_ID": "0",
}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, ProcessIdentity(0, 1, 0, 1, "alone")),
        (TORCHRUN, ProcessIdentity(3, 4, 1, 2, "torchrun", "a", 29500)),
        (OPENMPI, ProcessIdentity(1, 2, 1, 2, "openmpi")),
        (HYDRA, ProcessIdentity(2, 3, 0, 1, "mpich")),
        ({**HYDRA, "MASTER_ADDR": "b", "MASTER_PORT": "5"}, ProcessIdentity(2, 3, 0, 1, "mpich", "b", 5)),
        (SLURM, ProcessIdentity(5, 6, 2, 3, "slurm", "node07", 20279)),
        # The second host has fewer tasks than the first.
        (
            {**SLURM, "SLURM_STEP_TASKS_PER_NODE": "5,1", "SLURM_NODEID": "1", "SLURM_LOCALID": "0"},
            ProcessIdentity(5, 6, 0, 1, "slurm", "node07", 20279),
        ),
        ({**SLURM, **TORCHRUN}, ProcessIdentity(3, 4, 1, 2, "torchrun", "a", 29500)),
        ({**SLURM, **OPENMPI}, ProcessIdentity(1, 2, 1, 2, "openmpi")),
        # A batch script sees the whole job's task count but is one process.
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "6"}, ProcessIdentity(0, 1, 0, 1, "alone")),
    ],
)
def test_who_am_i(environment: dict[str, str], expected: ProcessIdentity) -> None:
    assert who_am_i(environment) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"RANK": "x"}, "RANK: a whole number"),
        ({"RANK": "4"}, "below the size"),
        ({"MASTER_PORT": ""}, "PORT"),
    ],
)
def test_a_broken_environment_names_the_variable(change: dict[str, str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        who_am_i({**TORCHRUN, **change})


def test_several_hosts_without_a_meeting_point() -> None:
    with pytest.raises(ConfigError, match="export MASTER_ADDR"):
        meet(HYDRA)


def test_alone_one_has_a_secret_and_a_host() -> None:
    first, second = meet({}), meet({}, host="b", secret="00ff")
    assert first.hosts == (host_identity(),) and len(first.secret) == 32
    assert second.hosts == ("b",) and second.secret == b"\x00\xff"


def test_a_given_secret_stays_out_of_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    assert not meet({}, secret="00ff").store.check(["secret"])
    assert meet({}).store.check(["secret"])


def test_ranks_with_and_without_a_secret_are_told_apart(tmp_path: Path) -> None:
    store = dist.FileStore(str(tmp_path / "meeting"), 2)
    card = '{"host": "h", "address": "", "has_secret": true}'
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meeting, "_open_store", lambda *_: store)
        patch.setattr(meeting, "_meetings", 7)
        dist.PrefixStore("paceline/7", store).set("card/0", card)
        with pytest.raises(ConfigError, match=r"rank 1: ranks \[1\] of 2 were started without"):
            meet({"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"})
