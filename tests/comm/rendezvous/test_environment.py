"""Who am I, for every launcher; and where ranks meet."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

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
    first, second = meet({}), meet({}, host="b")
    assert first.hosts == (host_identity(),) and len(first.secret) == 32
    assert second.hosts == ("b",) and len(second.secret) == 32 and second.secret != first.secret


def test_nothing_secret_is_in_the_store(monkeypatch: pytest.MonkeyPatch) -> None:
    key, store = b"k" * 16, dist.HashStore()
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda r: met(store, key, r), range(2)))
    assert both[0].secret == both[1].secret
    values = b"".join(store.get(k) for k in ("card/0", "card/1"))
    assert not store.check(["secret"])
    for secret in (both[0].secret, key):
        assert secret not in values and secret.hex().encode() not in values


def met(store: dist.Store, key: bytes, rank: int) -> meeting.Meeting:
    return meeting.meet_in_store(
        store,
        ProcessIdentity(rank, 2, rank, 2, "alone"),
        key=key,
        host="h",
        address="",
        timeout_s=20,
        advice="",
    )
