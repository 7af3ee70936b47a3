"""What the simulated fabric itself costs: real microseconds per virtual event, and memory of many workers.

    python benchmarks/simulator.py                  events of messages and collectives that carry nothing
    python benchmarks/simulator.py --digits 512     a short run of digits with a parameter server

Events are whatever the virtual clock handles: ends of computations, arrivals, faults. The first form has
nothing but the scheduler in it (8-byte messages, no gradients); CPU time of the process, so that other load
does not count.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from typing import Any

import torch

from paceline.comm import current
from paceline.comm.simulated.simulate import simulate
from paceline.types import Message


def empty_events(workers: int, steps: int) -> dict[str, Any]:
    """Every worker computes, calls its neighbour, and now and then all meet."""

    def body() -> None:
        comm: Any = current.provided()
        comm.serve("echo", lambda src, message: message)
        comm.barrier().wait()
        for step in range(steps):
            comm.charge_compute()
            comm.call((comm.rank + 1) % comm.size, "echo", Message({"step": step}, [torch.zeros(1)])).wait()
            if step % 10 == 0:
                comm.barrier().wait()

    begin = time.process_time()
    run = simulate(body, num_workers=workers, compute="pareto(shape=3)", record=False)
    spent = time.process_time() - begin
    return {"workers": workers, "events": run.num_events, "us_per_event": 1e6 * spent / run.num_events}


def digits(workers: int, strategy: str) -> dict[str, Any]:
    """One epoch with two samples per worker."""
    from paceline.bench.compare import compare
    from paceline.bench.virtual import VirtualCluster

    begin = time.perf_counter()
    virtual = VirtualCluster("pareto(shape=3)", "ethernet(gbit=1)")
    options: dict[str, Any] = {"batch_size": 2 * workers, "epochs": 2, "virtual": virtual, "progress": False}
    (trial,) = compare("digits", strategies=[strategy], workers=workers, **options).trials
    return {
        "workers": workers,
        "strategy": strategy,
        "accuracy": trial.curve[-1].accuracy,
        "wall_s": time.perf_counter() - begin,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--digits", type=int, default=0, metavar="N")
    parser.add_argument("--strategy", default="parameter_server(staleness=inverse)")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.digits:
        result = digits(options.digits, options.strategy)
        result["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(json.dumps(result, indent=1))
        return
    for workers, steps in ((8, 500), (32, 200), (128, 50)):
        print(json.dumps(empty_events(workers, steps)), flush=True)


if __name__ == "__main__":
    main()
