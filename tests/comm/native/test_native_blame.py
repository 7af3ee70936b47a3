"""Whose fault it is that an operation is late: named by ranks that never meet the culprit themselves."""

from __future__ import annotations

import os
import signal
import time

import pytest
import torch
from shm_ranks import finish, start

from paceline.errors import CommError

pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group("processes")]
CULPRIT = 1


def wait_body(comm, algorithm, first, how):
    """Rank 1 stops, or stays away; rank `first` gives up long before those that wait for rank 1."""
    tensor = torch.zeros(3_000_000)
    options = {} if algorithm is None else {"algorithm": algorithm}
    for _ in range(3):
        comm.all_reduce(tensor, **options).wait()
    comm.barrier().wait()
    comm.timeout_s = 1.0 if comm.rank == first else 30.0
    if comm.rank == CULPRIT:
        if how == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(60)
    started = time.monotonic()
    try:
        if how == "unwaited":
            comm.timeout_s = 30.0
            comm.all_reduce(tensor, **options).wait(1.0 if comm.rank == first else None)
        else:
            comm.all_reduce(tensor, **options).wait()
    except CommError as error:
        return type(error).__name__, str(error), time.monotonic() - started
    return None


def check(size, network, algorithm, first, how, words):
    """Every rank hears of rank 1; `words`: what the rank that gave up first says."""
    processes, pipes = start(size, wait_body, algorithm, first, how, network=network)
    try:
        for rank in (r for r in range(size) if r != CULPRIT):
            assert pipes[rank].poll(30), f"rank {rank} hangs"
            ok, value = pipes[rank].recv()
            assert ok, value
            name, text, waited_s = value
            assert name == "Timeout" and text.startswith(f"rank {rank}: "), value
            assert f"rank {CULPRIT}" in text, text
            assert rank != first or words in text, text
            assert waited_s < 10, "it waited for its own deadline"
    finally:
        processes[CULPRIT].kill()
        finish(processes)


@pytest.mark.parametrize("how", ["stopped", pytest.param("away", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("network", "first", "algorithm", "name"),
    [
        ("aab", 2, None, "rank 1"),  # rank 2 waits for rank 0, whose deadline is far
        pytest.param("bab", 2, None, "rank 1", marks=pytest.mark.slow),  # for rank 0, in shared memory
        pytest.param("abb", 2, None, "it", marks=pytest.mark.slow),  # for rank 1
        pytest.param(
            "abcd", 3, "ring", "rank 1", marks=pytest.mark.slow
        ),  # every rank waits for its left neighbour
        pytest.param("abcd", 3, "double_binary_tree", "it", marks=pytest.mark.slow),  # for rank 1
    ],
)
def test_blame_goes_down_the_chain(network, first, algorithm, name, how):
    words = {"stopped": "does not answer", "away": "answers, but is in no operation"}
    check(len(network), network, algorithm, first, how, f"{name} {words[how]}")


def test_a_short_wait_names_the_culprit():
    check(3, "aab", None, 2, "unwaited", f"rank {CULPRIT} answers, but is in no operation")
