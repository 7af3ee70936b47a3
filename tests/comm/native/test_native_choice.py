"""Which algorithm runs, why, how to choose another, and how urgent operations overtake."""

from __future__ import annotations

import json
import os
import time

import pytest
import torch
from shm_ranks import run

from paceline.comm.native import tuning
from paceline.comm.native.choice import Choice, ChoiceTable
from paceline.errors import ConfigError
from paceline.types import ReduceOp

pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group("processes")]
FABRICS = pytest.mark.parametrize("network", [False, True], ids=["shm", "tcp"])


def shared_memory_body(comm):
    explained = {n: comm.explain("all_reduce", n).algorithm for n in (4, 64 << 10, (64 << 10) + 4, 1 << 28)}
    assert explained == {4: "eager", 64 << 10: "eager", (64 << 10) + 4: "staged", 1 << 28: "staged"}
    near = comm.explain("all_reduce", 1 << 20, buffers="allocated")
    assert (near.algorithm, near.runner_up) == ("zero-copy", "staged")
    assert str(near).startswith("all_reduce of 1048576 bytes: zero-copy: the buffers lie in shared memory")
    assert comm.explain("barrier", 0).algorithm == "eager"
    for operation, limit in (("broadcast", (32 << 10) - 16), ("all_to_all", (32 << 10) - 32)):
        # 16 bytes of the post say where a receiver's range is.
        near = [comm.explain(operation, n).algorithm for n in (limit, limit + 1)]
        assert near == ["eager", "staged"], operation
    for wrong in (lambda: comm.explain("allreduce", 4), lambda: comm.explain("reduce", 4, buffers="gpu")):
        with pytest.raises(ConfigError, match=r"all_reduce|'private' or 'allocated' expected"):
            wrong()
    with pytest.raises(ConfigError, match="the protocol follows from the size"):
        comm.all_reduce(torch.ones(3), algorithm="ring")
    with pytest.raises(ConfigError, match="priority=-1"):
        comm.all_reduce(torch.ones(3), priority=-1)


def test_explain_over_shared_memory():
    run(2, shared_memory_body)


def override_body(comm):
    p = comm.size
    total = float(sum(range(1, p + 1)))
    for name in ("ring", "recursive_doubling", "direct"):
        for n in (1, 7, 5000):
            t = torch.full((n,), float(comm.rank + 1))
            comm.all_reduce(t, algorithm=name).wait()
            assert torch.all(t == total), (name, n)
    # Shares: from ranks that reduce nothing to one that reduces all, more and less than one step takes.
    for weights in ("1/2/0", "0/0/5", "0/1/0", "33/33/34"):
        for n in (0, 1, 700, 1001, 300_007):
            t = torch.arange(n, dtype=torch.float32) * (comm.rank + 1)
            comm.all_reduce(t, algorithm=f"direct(shares={weights})").wait()
            assert torch.equal(t, torch.arange(n, dtype=torch.float32) * total), (weights, n)
            t = torch.arange(n, dtype=torch.int32) * (comm.rank + 1)
            comm.all_reduce(t, op=ReduceOp.MAX, algorithm=f"direct(shares={weights})").wait()
            assert torch.equal(t, torch.arange(n, dtype=torch.int32) * p), (weights, n)
    source, whole = torch.full((4,), float(comm.rank)), torch.empty(4 * p)
    comm.all_gather(whole, source, algorithm="ring").wait()
    assert torch.equal(whole, torch.arange(p, dtype=torch.float32).repeat_interleave(4))
    out = torch.empty(4)
    comm.reduce_scatter(out, whole, algorithm="ring", priority=1).wait()
    assert torch.all(out == p * comm.rank)
    t = torch.full((9,), float(comm.rank))
    comm.broadcast(t, root=1, algorithm="binomial_tree").wait()
    assert torch.all(t == 1)
    for wrong, text in (
        ("rings", "ring"),
        ("pairwise", "cannot do all_reduce"),
        ("direct(shares=1/2)", "3 weights"),
    ):
        with pytest.raises(ConfigError, match=text):
            comm.all_reduce(torch.ones(2), algorithm=wrong)
    assert comm.algorithm_for("all_reduce", 4) == "direct", "an override holds for one call"
    comm.barrier().wait()


def test_algorithm_of_one_call():
    run(3, override_body, network=True)


def selection_body(comm, folder):
    os.environ["XDG_CACHE_HOME"] = folder
    tuning.SIZES = (1 << 10, 64 << 10)
    first = tuning.adopt(comm)
    assert first.source == "measured"
    again = tuning.adopt(comm)
    assert again.source.startswith(folder) and again.choices == first.choices
    for operation in tuning.OPERATIONS:
        choice = comm.explain(operation, 2000)
        assert choice.runner_up and choice.runner_up != choice.algorithm
        assert list(choice.times_s.values()) == sorted(choice.times_s.values())
        assert "fastest when measured here" in choice.reason and "nearest size" in choice.reason
        assert comm.algorithm_for(operation, 2000) == choice.algorithm
    t = torch.ones(1000)
    comm.all_reduce(t).wait()
    assert torch.all(t == comm.size)
    # What the table says is what runs.
    comm.selection = ChoiceTable((Choice("all_reduce", 4000, "ring", "told to"),), "here")
    seen = []
    inner = comm._run
    comm._run = lambda algorithm, *rest, **more: seen.append(algorithm) or inner(algorithm, *rest, **more)
    comm.all_reduce(torch.ones(1000)).wait()
    assert seen == ["ring"]
    return json.loads(first.to_json())


def test_the_measured_table_is_the_same_everywhere_and_kept(tmp_path):
    tables = run(3, selection_body, str(tmp_path), network=True)
    assert tables[0] == tables[1] == tables[2]
    (path,) = tmp_path.glob("paceline/algorithms-*.json")
    path.write_text('{"version": 1, "choices": [{"operation": 3}]}')
    tables = run(
        3, selection_body, str(tmp_path), network=True
    )  # after a damaged file, links are measured again
    assert tables[0] == tables[1] == tables[2] == json.loads(path.read_text())


def overtaking_body(comm, network):
    big = torch.zeros((16 if network else 64) << 20)
    small = torch.ones(1)
    comm.all_reduce(torch.ones(1), priority=1).wait()  # makes the lane
    for _ in range(5):
        small.fill_(1)
        comm.barrier().wait()
        slow = comm.all_reduce(big)
        comm.all_reduce(small, priority=1).wait()
        overtook = not slow._operation.is_done
        slow.wait()
        assert small.item() == comm.size
        flag = torch.tensor([float(overtook)])
        comm.all_reduce(flag).wait()
        if flag.item() == comm.size:
            break
    else:
        raise AssertionError("a small urgent operation waited for a large one five times")
    # Without priority the order is that of the calls.
    slow = comm.all_reduce(big)
    comm.all_reduce(small).wait()
    assert slow._operation.is_done
    assert comm.ledger.operations["all_reduce"].calls >= 6, "urgent operations are counted with the others"


@FABRICS
def test_urgent_operations_overtake(network):
    run(2, overtaking_body, network, network=network)


def urgent_parts_body(comm):
    part = comm.split([r for r in range(comm.size) if r != 1])
    if part is not None:
        t = torch.full((3,), float(comm.rank))
        part.all_reduce(t, priority=2).wait()
        assert torch.all(t == 2)
        part.close()
    comm.barrier().wait()
    time.sleep(0.05)


@FABRICS
def test_priorities_in_a_part_of_the_ranks(network):
    run(3, urgent_parts_body, network=network)
