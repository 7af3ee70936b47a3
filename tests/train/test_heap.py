"""Memory that a step frees is there for the next one without page faults, unless the user says otherwise."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from paceline.train.heap import keep_freed_memory

_SCRIPT = """
import resource
import torch
import paceline

job = paceline.init(progress=False)
model = torch.nn.Linear(1000, 5000)
model = job.prepare(model, torch.optim.SGD(model.parameters(), lr=0.1))[0]
x = torch.zeros(100, 1000)

def step():
    model(x).sum().backward()
    model.zero_grad()

for _ in range(30):  # aligned blocks leave gaps at first, and the heap grows
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(10):
    step()
print("faults", resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def _faults(**environment: str) -> int:
    clean = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_") and k != "GLIBC_TUNABLES"}
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT],
        env={**clean, "OMP_NUM_THREADS": "1", **environment},
        check=True,
        capture_output=True,
        text=True,
    )
    return int(done.stdout.split("faults")[1])


def test_steps_do_not_fault_their_memory_in_again() -> None:
    """Each step frees 20 MB of gradients: about 5,000 pages."""
    assert _faults() < 20_000


@pytest.mark.slow
def test_what_the_user_says_of_malloc_holds() -> None:
    """With the user's own threshold every step faults its pages in."""
    assert _faults(MALLOC_TRIM_THRESHOLD_="131072") > 45_000


@pytest.mark.parametrize(
    "environment",
    [
        {"MALLOC_MMAP_THRESHOLD_": "65536"},
        {"MALLOC_TRIM_THRESHOLD_": "65536"},
        {"GLIBC_TUNABLES": "glibc.malloc.arena_max=2"},
    ],
)
def test_malloc_is_left_alone(environment: dict[str, str]) -> None:
    """Whatever tells malloc what to do wins."""
    assert not keep_freed_memory(environment)
