"""Which fabric a job gets: all ranks agree, and what cannot work is replaced on all of them."""

from __future__ import annotations

import os
import tempfile
import warnings
from typing import Any

import pytest
import shm_ranks
import torch

from paceline import _core
from paceline.comm import fabric as fabrics
from paceline.comm.native import shared_memory
from paceline.errors import ConfigError, PacelineError

pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group("processes")]


def rank_main(rank: int, path: str, name: str | None, trouble: str, pipe: Any) -> None:
    torch.set_num_threads(1)
    if rank == 1 and trouble == "core":
        fabrics._problem = lambda device: "no memfd here"  # type: ignore[assignment]
    if rank == 1 and trouble == "memory":
        shared_memory._core = Refusing()  # type: ignore[assignment]
    wanted = "torch" if trouble == "choice" and rank == 1 else name
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            comm = fabrics.connect(shm_ranks.meeting(rank, 3, path), wanted, timeout_s=30)
        except PacelineError as error:
            pipe.send((type(error).__name__, str(error), []))
            return
        x = torch.full((1000,), float(rank + 1))
        comm.all_reduce(x).wait()
        texts = [str(w.message) for w in said if issubclass(w.category, UserWarning)]
        pipe.send((type(comm).__name__, float(x[0]), texts))
        comm.barrier().wait()
        comm.close()


class Refusing:
    """The core, where the memory of other processes cannot be opened."""

    def __getattr__(self, name: str) -> Any:
        return getattr(_core, name)

    class SharedMemoryGroup:
        def __init__(self, *arguments: Any) -> None:
            self._group = _core.SharedMemoryGroup(*arguments)
            self.address, self.close = self._group.address, self._group.close

        def connect(self, addresses: Any) -> None:
            raise ConfigError("cannot open the shared memory of process 1: Permission denied")


def outcome(name: str | None, trouble: str = "") -> list[Any]:
    path = os.path.join(tempfile.mkdtemp(), "store")
    processes, pipes = [], []
    for rank in range(3):
        ours, theirs = shm_ranks.CONTEXT.Pipe(duplex=False)
        process = shm_ranks.CONTEXT.Process(target=rank_main, args=(rank, path, name, trouble, theirs))
        process.start()
        theirs.close()
        processes.append(process)
        pipes.append(ours)
    try:
        assert all(pipe.poll(60) for pipe in pipes), "a rank hangs"
        return [pipe.recv() for pipe in pipes]
    finally:
        shm_ranks.finish(processes)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        (None, "SharedMemoryCommunicator"),
        ("native", "SharedMemoryCommunicator"),
        ("torch", "TorchCommunicator"),
    ],
)
def test_native_unless_told_otherwise(name: str | None, kind: str) -> None:
    assert outcome(name) == [(kind, 6.0, [])] * 3


def test_refused_memory_becomes_tcp_on_all_ranks() -> None:
    ranks = outcome(None, "memory")
    assert [r[:2] for r in ranks] == [("NetworkCommunicator", 6.0)] * 3
    assert "TCP instead: rank 1: cannot open" in ranks[0][2][0]
    assert not ranks[1][2] and not ranks[2][2], "one rank says it"


def test_an_unusable_core_becomes_torch_on_all_ranks_or_an_error_if_native_was_asked_for() -> None:
    ranks = outcome(None, "core")
    assert [r[:2] for r in ranks] == [("TorchCommunicator", 6.0)] * 3
    assert "stands in for the native one: rank 1: no memfd here" in ranks[0][2][0]
    for kind, text, _ in outcome("native", "core"):
        assert kind == "ConfigError" and "rank 1: no memfd here" in text


def test_ranks_that_want_different_fabrics_are_told() -> None:
    for kind, text, _ in outcome("native", "choice"):
        assert kind == "Mismatch" and "rank 0 was started with fabric native, rank 1 with torch" in text


def test_unknown_names_are_refused() -> None:
    path = os.path.join(tempfile.mkdtemp(), "store")
    with pytest.raises(ConfigError, match="unknown fabric 'gloo': native or torch expected"):
        fabrics.connect(shm_ranks.meeting(0, 1, path), "gloo", timeout_s=5)


def test_models_on_other_devices_get_the_torch_fabric_beside_the_native_one(monkeypatch: Any) -> None:
    from paceline.comm import torch_fabric

    path = os.path.join(tempfile.mkdtemp(), "store")
    comm = fabrics.connect(shm_ranks.meeting(0, 1, path), timeout_s=5)
    asked: list[Any] = []
    monkeypatch.setattr(torch_fabric, "connect", lambda meeting, **options: asked.append(options))
    assert fabrics.for_device(comm, torch.device("cpu")) is comm
    fabrics.for_device(comm, torch.device("cuda", 0))
    assert [o["device"] for o in asked] == [torch.device("cuda", 0)]
    comm.close()
