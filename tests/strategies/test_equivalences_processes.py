"""The equivalences between methods, with real processes on each fabric and in simulation: one body for all.

Made-up quadratic losses in float64, one target per rank and step. Asynchronous methods take turns here, one
rank's exchange after the other, so that what processes do does not depend on who is faster.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

import paceline
from paceline.strategies.base.strategy import make

pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group("processes")]

WORKERS, STEPS = 3, 12
STRATEGIES = [
    "local_sgd(period=1)",
    "local_sgd(period=3)",
    "bmuf(period=3, momentum=0, rate=1, nesterov=false)",
    "bmuf(period=3, momentum=0.9, rate=0.7)",
    "diloco(period=3, momentum=0.9, rate=0.7)",
    "parameter_server(staleness=bounded(s=0), rate=0.3333333333333333)",
    "parameter_server(staleness=constant)",
    "parameter_server(staleness=softsync(c=1)+constant)",
]
TURNS = [s for s in STRATEGIES if "constant" in s]


class Flat:
    """What strategies see of a replica."""

    def __init__(self) -> None:
        self.parameters = [torch.linspace(-1, 1, 10, dtype=torch.float64)]
        self.gradients: list[torch.Tensor] = []
        self.weight, self.has_samples = 1.0, True

    def adopt(self) -> None:
        pass

    def optimizer_state(self) -> list[Any]:
        return []


def update(rank: int, step: int, weights: torch.Tensor) -> torch.Tensor:
    target = torch.sin(torch.arange(10, dtype=torch.float64) * (rank + 1) + step)
    return -0.1 * (weights - target)


def run_all() -> dict[str, tuple[list[float], list[float], float]]:
    """Every strategy in turn: final weights, the outer optimizer's start point if any, mean staleness."""
    job = paceline.init()
    comm, found = job.comm, {}
    for number, text in enumerate(STRATEGIES):
        model, method = Flat(), make(text)
        method.scope = str(number)
        method.attach(model, comm)
        comm.barrier().wait()
        for step in range(STEPS):
            method.before_update()
            model.parameters[0].add_(update(comm.rank, step, model.parameters[0]))
            if text not in TURNS:
                method.after_update()
                continue
            for turn in range(comm.size):
                if turn == comm.rank:
                    method.after_update()
                comm.barrier().wait()
        outer: Any = getattr(method, "outer", None)
        start = [] if outer is None else outer.start[0].tolist()
        method.synchronize()
        found[text] = (model.parameters[0].tolist(), start, method.stats().get("staleness_mean", 0.0))
        comm.barrier().wait()
    job.close()
    return found


def one_machine() -> torch.Tensor:
    weights = torch.linspace(-1, 1, 10, dtype=torch.float64)
    for step in range(STEPS):
        weights = weights + sum(update(r, step, weights) for r in range(WORKERS)) / WORKERS
    return weights


@pytest.mark.parametrize("fabric", ["simulated", "native", "torch"])
def test_equivalences(fabric: str) -> None:
    if fabric == "simulated":
        results = list(paceline.simulate(run_all, num_workers=WORKERS, compute="exponential"))
    else:
        results = paceline.launch(run_all, num_workers=WORKERS, fabric=fabric, progress=False, threads=1)
    assert all(r == results[0] for r in results)
    final = {s: torch.tensor(w, dtype=torch.float64) for s, (w, _, _) in results[0].items()}
    start = {s: torch.tensor(b, dtype=torch.float64) for s, (_, b, _) in results[0].items()}
    averaging, third, cbm, nbm, diloco, bulk, downpour, softsync = STRATEGIES
    near = {"rtol": 1e-12, "atol": 1e-12}
    torch.testing.assert_close(final[averaging], one_machine(), **near)  # k = 1 is synchronous SGD
    torch.testing.assert_close(final[cbm], final[third], **near)  # CBM(1, 0) is averaging
    torch.testing.assert_close(start[nbm], start[diloco], **near)  # NBM is DiLoCo's outer step
    assert not torch.allclose(final[nbm], final[diloco])  # the final models differ by the look-ahead
    torch.testing.assert_close(final[bulk], one_machine(), **near)  # SSP with s = 0 is bulk synchronous
    assert torch.equal(final[softsync], final[downpour])  # softsync(1) + constant is Downpour
    assert results[0][downpour][2] == WORKERS - 1  # and these are asynchronous
    assert not torch.allclose(final[downpour], one_machine())
