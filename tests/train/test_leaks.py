"""Joining and leaving a job again and again keeps no descriptor, thread, segment, job or megabyte."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

CYCLES = """
import gc, json, os, sys, time
import torch
import paceline
from paceline.train.job import Job

cycles, by_tcp = int(sys.argv[1]), sys.argv[2] == "tcp"
torch.set_num_threads(1)


def cycle():
    # A host of its own for every rank: they meet over TCP.
    job = paceline.init(host=f"host{os.environ.get('RANK')}" if by_tcp else None)
    job.comm.all_reduce(torch.ones(4)).wait()
    job.close()


def kept():
    # The rank that closes first keeps its segments mapped until the other is through.
    seen = []
    for _ in range(20):
        seen.append(now())
        time.sleep(0.1)
    return {name: min(each[name] for each in seen) for name in seen[0]}


def now():
    gc.collect()
    maps = open("/proc/self/maps").read()
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "threads": len(os.listdir("/proc/self/task")),
        "segments": maps.count("memfd:paceline"),
        "jobs": sum(type(o) is Job for o in gc.get_objects()),
        "megabytes": int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE") >> 20,
    }


for _ in range(5):
    cycle()
before = kept()
for _ in range(cycles):
    cycle()
print("KEPT", json.dumps([before, kept()]), flush=True)
"""


def cycles(count: int, where: str, folder: Path) -> list[tuple[dict[str, int], dict[str, int]]]:
    """What two workers (one, if alone) keep before and after `count` cycles."""
    script = folder / "cycles.py"
    script.write_text(CYCLES)
    launcher = [] if where == "alone" else ["-m", "paceline.cli.main", "run", "-n", "2"]
    run = subprocess.run(
        [sys.executable, *launcher, str(script), str(count), where],
        capture_output=True,
        text=True,
        timeout=1500,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return [json.loads(line.partition("KEPT ")[2]) for line in run.stdout.splitlines() if "KEPT " in line]


def check(kept: list[tuple[dict[str, int], dict[str, int]]], megabytes: int) -> None:
    assert kept
    for before, after in kept:
        assert after.pop("megabytes") - before.pop("megabytes") <= megabytes
        grown = {name: after[name] - before[name] for name in after if after[name] > before[name] + 2}
        assert not grown, f"kept after many cycles: {grown}"


@pytest.mark.distributed
@pytest.mark.parametrize("where", ["alone", "shared memory", "tcp"])
def test_nothing_is_kept(where: str, tmp_path: Path) -> None:
    check(cycles(30, where, tmp_path), megabytes=4)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("where", ["alone", "shared memory", "tcp"])
def test_nothing_is_kept_by_a_thousand(where: str, tmp_path: Path) -> None:
    check(cycles(1000, where, tmp_path), megabytes=4)
