"""Strangers at every listener of a job, by whichever launcher it was started."""

from __future__ import annotations

from pathlib import Path

import pytest
from strangers.jobs import ONE_HOST, attacked
from test_mpi import installed

pytestmark = [pytest.mark.engines, pytest.mark.xdist_group("engines")]

LISTENERS = {
    "run": (2, 0),
    "backend": (0, 0),
    "torchrun": (0, 0),
    "nodes": (2, 1),
    "hosts": (4, 1),
    "ray": (2, 0),
    "spark": (2, 0),
    "mpi": (2, 0),
    "slurm": (2, 0),
}
"""By launcher, how many listeners its two ranks and it may have."""


ELSEWHERE = [pytest.param(kind, marks=pytest.mark.exhaustive) for kind in ("run", "backend", "torchrun")]


@pytest.mark.parametrize("kind", ["ray", "spark", "mpi", "nodes", "slurm", *ELSEWHERE])
def test_strangers_stop_no_job_and_reach_no_key(kind: str, tmp_path: Path) -> None:
    needed = {"ray": "ray", "spark": "pyspark"}.get(kind)
    if needed:
        pytest.importorskip(needed, reason=f"the extra paceline[{kind}] is not installed")
    mpirun = installed("mpich") if kind == "mpi" else ""
    told = attacked(kind, tmp_path, seconds=1.0, mpirun=mpirun)
    assert (told["ranks"], told["launcher"]) == LISTENERS[kind], told
    assert told["keys"] == 0
    assert told["reachable_from_other_hosts"] == 0 or kind not in ONE_HOST
    assert told["lines"] < 80  # what is said about strangers is bounded
