"""One rank of a job between the lab's hosts: says "up", does what it was told, prints one JSON value."""

from __future__ import annotations

import json
import sys

import torch

from paceline.comm.native import tuning
from paceline.comm.native.shared_memory import connect
from paceline.comm.rendezvous.meeting import meet
from paceline.errors import CommError
from paceline.types import ReduceOp


def check(comm):
    """Operations of all kinds against their definition."""
    p, me = comm.size, comm.rank
    for n in (1, 1000, 70_001, 1_000_003):
        everyone = [torch.arange(n, dtype=torch.float32) % 97 + r for r in range(p)]
        total = torch.stack(everyone).sum(0)
        t = everyone[me].clone()
        comm.all_reduce(t).wait()
        assert torch.equal(t, total), n
        out = torch.empty(n * p)
        comm.all_gather(out, everyone[me]).wait()
        assert torch.equal(out, torch.cat(everyone)), n
        part = torch.empty(n)
        comm.reduce_scatter(part, torch.cat(everyone), op=ReduceOp.MAX).wait()
        assert torch.equal(part, everyone[me]), n
        t = everyone[me].clone()
        comm.broadcast(t, root=p - 1).wait()
        assert torch.equal(t, everyone[-1]), n
        right, left = (me + 1) % p, (me - 1) % p
        sent = comm.send(everyone[me], right, tag=5)
        comm.recv(t, left, tag=5).wait()
        sent.wait()
        assert torch.equal(t, everyone[left]), n
    comm.barrier().wait()
    return {"wire_bytes": comm.wire_bytes}


def carry(comm):
    """`check`, and enough bytes to keep several rails busy."""
    t = torch.ones(4 << 20)
    for i in range(4):
        comm.all_reduce(t).wait()
        assert torch.all(t == comm.size ** (i + 1))
    return check(comm)


def choose(comm):
    """What is selected for a large all_reduce on these links; and it works."""
    comm.selection = tuning.tune(comm, ("all_reduce",), (4 << 20,))
    choice = comm.explain("all_reduce", 16 << 20)
    t = torch.arange(1 << 20, dtype=torch.float32) * (comm.rank + 1)
    comm.all_reduce(t).wait()
    assert torch.equal(t, torch.arange(1 << 20, dtype=torch.float32) * sum(range(1, comm.size + 1)))
    return {"algorithm": choice.algorithm, "text": str(choice), "times_s": dict(choice.times_s)}


def go_on(comm):
    """all_reduce until a peer is missing."""
    t = torch.zeros(300_000)
    for i in range(1_000_000):
        try:
            comm.all_reduce(t).wait()
        except CommError as error:
            return {"error": type(error).__name__, "text": str(error)}
        if i == 3:
            print("up", flush=True)
    return None


if __name__ == "__main__":
    torch.set_num_threads(1)
    comm = connect(meet(), timeout_s=float(sys.argv[2]))
    value = {"check": check, "carry": carry, "choose": choose, "go_on": go_on}[sys.argv[1]](comm)
    print(json.dumps(value), flush=True)
    comm.close()
