"""Timelines that the environment and the script start; names Horovod only, but for reading the files."""

import json
import os
import sys
from itertools import pairwise
from pathlib import Path

import horovod.torch as hvd
import torch

folder = Path(sys.argv[1])
full = len(sys.argv) > 2
hvd.init()
rank, size = hvd.rank(), hvd.size()


def rows(path):
    return json.loads(path.read_text())


def phases_of(mine, track):
    return [r["ph"] for r in mine if r["tid"] == track and r["ph"] != "X"]


def tracks(found, *complete):
    """Names of begun spans by process name; each must end. Of `complete` names, all ranks asked."""
    names = {r["pid"]: r["args"]["name"] for r in found if r.get("name") == "process_name" and r["pid"]}
    spans = {}
    for name in set(names.values()):
        mine = [r for r in found if names.get(r["pid"]) == name and r["ph"] in "BEX"]
        for track in (0, 1):
            phases = phases_of(mine, track)
            assert phases == ["B", "E"] * (len(phases) // 2), (name, phases)
        assert all(a["ts"] <= b["ts"] for a, b in pairwise(mine))
        spans[name] = [r["name"] for r in mine if r["ph"] == "B"]
        ticks = [r["name"] for r in mine if r["ph"] == "X"]
        if name in complete:
            assert sorted(ticks) == sorted([str(r) for r in range(size)] * (len(phases_of(mine, 0)) // 2)), (
                ticks
            )
    return spans


for _ in range(3):
    hvd.allreduce(torch.ones(3), name="one")
hvd.allgather(torch.ones(rank + 1), name="rows")
if full:
    assert hvd.allreduce(torch.ones(1)).item() == 1  # goes on after the failed write
    hvd.stop_timeline()
    hvd.start_timeline("/dev/full")
    assert hvd.allreduce(torch.ones(1)).item() == 1
else:
    hvd.start_timeline(folder / "second.json", mark_cycles=True)
    hvd.barrier()  # what other ranks asked for before is still in the first file
    hvd.grouped_allreduce([torch.ones(3), torch.ones(2)], name="two")
    hvd.barrier()
    hvd.stop_timeline()
    hvd.stop_timeline()
    if rank == 0:
        first, second = rows(Path(os.environ["HOROVOD_TIMELINE"])), rows(folder / "second.json")
        assert "start_time_since_epoch_in_micros" in first[0]["args"]
        spans = tracks(first, "allreduce.one", "allgather.rows")
        assert spans["allreduce.one"] == ["NEGOTIATE_ALLREDUCE", "ALLREDUCE"] * 3, spans
        assert spans["allgather.rows"] == ["NEGOTIATE_ALLGATHER", "ALLGATHER"]
        ends = [r["args"] for r in first if r["ph"] == "E" and "args" in r]
        assert ends[0] == {"dtype": "float32", "shape": "[3]"}
        assert "allreduce.one" not in tracks(second)
        assert tracks(second, "allreduce.two")["allreduce.two"] == ["NEGOTIATE_ALLREDUCE", "ALLREDUCE"]
        assert "CYCLE_START" in {r["name"] for r in second if r["ph"] == "i"}
        assert not [r for r in first if r["ph"] == "i"]
    hvd.start_timeline(folder / "third.json")
    assert hvd.allreduce(torch.ones(2)).tolist() == [1, 1]
    hvd.shutdown()
    if rank == 0:
        assert any(r["ph"] == "E" for r in rows(folder / "third.json"))
print("all good")
