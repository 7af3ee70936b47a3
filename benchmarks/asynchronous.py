"""Simulated experiments with asynchronous methods; makes the pictures of docs/asynchronous.md.

    python benchmarks/asynchronous.py shape       accuracy of staleness policies, 30 workers, digits, 3 seeds
    python benchmarks/asynchronous.py rates       the same at two other learning rates (no picture)
    python benchmarks/asynchronous.py periods     accuracy of averaging periods 1, 5, 20, 200
    python benchmarks/asynchronous.py stragglers  throughput against workers under Pareto compute times
    python benchmarks/asynchronous.py servers     throughput against shards, 32 workers, 1 Gbit/s
    python benchmarks/asynchronous.py in_step     the same with constant compute times (no picture)

Each prints its figures as JSON and writes docs/pictures/asynchronous_<name>.svg.
"""

from __future__ import annotations

import json
import statistics
import sys
from contextlib import nullcontext
from math import exp, gamma, lgamma
from typing import Any

import torch
from chart import Series, draw

from paceline.bench.compare import compare
from paceline.bench.virtual import VirtualCluster
from paceline.comm import current
from paceline.comm.simulated.network import HEADER_BYTES
from paceline.comm.simulated.simulate import simulate
from paceline.strategies.base.strategy import make


def rates() -> Any:
    slow = shape(learning_rate=0.02, draws=False)
    return {"0.02": slow, "0.08, 12 epochs": shape(learning_rate=0.08, epochs=12, draws=False)}


def shape(
    seeds: int = 3,
    epochs: int = 16,
    workers: int = 30,
    learning_rate: float = 0.05,
    draws: bool = True,
) -> Any:
    strategies = [
        "all_reduce",
        "parameter_server(staleness=constant)",
        "parameter_server(staleness=inverse)",
        "parameter_server(staleness=softsync(c=4)+inverse)",
    ]
    curves: Series = {}
    best: dict[str, list[float]] = {s: [] for s in strategies}
    for seed in range(seeds):
        for trial in accuracies(
            strategies, workers=workers, seed=seed, epochs=epochs, learning_rate=learning_rate
        ):
            best[trial.strategy].append(trial.curve[-1].accuracy)
            if seed == 0:
                curves[trial.strategy] = [(p.epoch, 100 * p.accuracy) for p in trial.curve]
    if draws:
        title = f"{workers} workers, learning rate {learning_rate} for all, seed 0"
        draw("asynchronous_shape", title, "epochs", "test accuracy, %", curves)
    return {s: {"median": statistics.median(v), "seeds": v} for s, v in best.items()}


def periods(seeds: int = 3, epochs: int = 16, workers: int = 30, learning_rate: float = 0.02) -> Any:
    found: dict[int, list[float]] = {1: [], 5: [], 20: [], 200: []}
    for seed in range(seeds):
        for trial in accuracies(
            [f"local_sgd(period={k})" for k in found],
            workers=workers,
            seed=seed,
            epochs=epochs,
            learning_rate=learning_rate,
        ):
            period = int(trial.strategy.split("=")[1].rstrip(")"))
            found[period].append(100 * trial.curve[-1].accuracy)
    medians = {k: statistics.median(v) for k, v in found.items()}
    points = [(float(i), medians[k]) for i, k in enumerate(found)]
    names = ["1", "5", "20", "200"]
    draw(
        "asynchronous_periods",
        f"parameter averaging, {workers} workers",
        "period",
        "accuracy, %",
        {"digits, median of the seeds": points},
        ticks=dict(enumerate(names)),
        bottom=90.0,
    )
    return medians


def accuracies(strategies: list[str], *, workers: int, **options: Any) -> Any:
    virtual = VirtualCluster("pareto(shape=3)", "ethernet(gbit=1)")
    given: dict[str, Any] = {"batch_size": 2 * workers, "virtual": virtual, "progress": False, **options}
    return compare("digits", strategies=strategies, workers=workers, **given).trials


def stragglers(steps: int = 2000) -> Any:
    sizes, minimum_s = [1, 2, 4, 8, 16, 32], 0.01
    measured, formula, alone = [], [], []
    for p in sizes:
        measured.append((float(p), p / throughput_s(p, steps, is_synchronous=True)))
        slowest = minimum_s * exp(lgamma(p + 1) - lgamma(p + 1 - 1 / 3)) * gamma(1 - 1 / 3)
        formula.append((float(p), p / slowest))
        alone.append((float(p), p / throughput_s(p, max(60, steps // p), is_synchronous=False)))
    series = {"synchronous": measured, "synchronous, formula": formula, "asynchronous": alone}
    draw(
        "asynchronous_stragglers",
        "Pareto(3) compute times, 10 ms at least",
        "workers",
        "minibatches per s",
        series,
    )
    return series


def throughput_s(num_workers: int, steps: int, *, is_synchronous: bool) -> float:
    """Virtual seconds per step of one worker, mean over workers."""

    def body() -> float:
        comm: Any = current.provided()
        method = make("parameter_server(shards=1, backup=0)")
        method.attach(Flat(10), comm)
        for _ in range(steps):
            comm.charge_compute()
            comm.barrier().wait() if is_synchronous else method.after_update()
        own_s = float(comm.now()) / steps
        method.synchronize()
        return own_s

    fast = "ethernet(gbit=100, latency_us=1)"
    run = simulate(
        body, num_workers=num_workers, compute="pareto(shape=3)", network=fast, record=False, seed=1
    )
    return statistics.fmean(run)


def in_step() -> Any:
    return servers(distribution="constant")


def servers(
    workers: int = 32,
    compute_s: float = 0.05,
    numel: int = 250_000,
    gbit: float = 1.0,
    distribution: str = "exponential",
) -> Any:
    """See docs/asynchronous.md for the station that a server's port is."""
    compute = f"{distribution}(mean_s={compute_s})"
    series: Series = {
        "parameter server": [],
        "closed queue": [],
        "fastest all-reduce": [],
        "tree all-reduce": [],
    }
    fastest_s, tree_s = (reduced_s(workers, numel, gbit, name) for name in ("", "reduction_tree"))
    slowest_s = compute_s
    if distribution == "exponential":
        slowest_s *= sum(1 / n for n in range(1, workers + 1))  # E[max]
    all_workers = {}
    for shards in (1, 2, 4, 8):
        slice_s = (4 * numel / shards + HEADER_BYTES) * 8e-9 / gbit
        demand_s = slice_s * (workers + shards - 2) / workers
        bound = closed_queue(workers, compute_s + shards * slice_s + 2 * 50e-6, demand_s)
        at = float(shards)
        pace, all_workers[shards] = served(workers, compute, numel, gbit, shards)
        series["parameter server"].append((at, pace))
        series["closed queue"].append((at, bound))
        series["fastest all-reduce"].append((at, workers / (slowest_s + fastest_s)))
        series["tree all-reduce"].append((at, workers / (slowest_s + tree_s)))
    if distribution == "exponential":
        title = f"{workers} workers, {4e-6 * numel:g} MB model, {gbit:g} Gbit/s"
        draw("asynchronous_servers", title, "shards", "minibatches per s", series)
    return {**series, "parameter server, all workers": all_workers}


def closed_queue(customers: int, think_s: float, demand_s: float) -> float:
    """Mean-value analysis of one station: customers per second."""
    throughput = queue = 0.0
    for n in range(1, customers + 1):
        response_s = demand_s * (1 + queue)
        throughput = n / (think_s + response_s)
        queue = throughput * response_s
    return throughput


def served(
    workers: int, compute: str, numel: int, gbit: float, shards: int, seconds: float = 16.0
) -> tuple[float, float]:
    """Minibatches per second, were all workers like those that host no shard; and of all as they are."""

    def body() -> list[float]:
        comm: Any = current.provided()
        method = make(f"parameter_server(shards={shards}, backup=0)")
        method.attach(Flat(numel), comm)
        ends = []
        # One window for all: after a fixed number of steps the last ones would meet emptying queues.
        while comm.now() < seconds:
            comm.charge_compute()
            method.after_update()
            ends.append(float(comm.now()))
        method.synchronize()
        return ends

    network, warm_s = f"ethernet(gbit={gbit})", seconds / 4
    run = simulate(body, num_workers=workers, compute=compute, network=network, record=False)
    hosts = {j * workers // shards for j in range(shards)}
    paces = [sum(warm_s <= t < seconds for t in ends) / (seconds - warm_s) for ends in run]
    return workers * statistics.fmean(p for r, p in enumerate(paces) if r not in hosts), sum(paces)


def reduced_s(workers: int, numel: int, gbit: float, algorithm: str) -> float:
    def body() -> float:
        comm: Any = current.provided()
        with comm.using(algorithm) if algorithm else nullcontext():
            comm.all_reduce(torch.zeros(numel)).wait()
        return float(comm.now())

    return float(simulate(body, num_workers=workers, network=f"ethernet(gbit={gbit})")[0])


class Flat:
    """A replica that is only flat parameters."""

    def __init__(self, numel: int) -> None:
        self.parameters = [torch.zeros(numel)]
        self.gradients: list[torch.Tensor] = []
        self.has_samples, self.weight = True, 1.0

    def adopt(self) -> None:
        pass


EXPERIMENTS = {
    "shape": shape,
    "rates": rates,
    "periods": periods,
    "stragglers": stragglers,
    "servers": servers,
    "in_step": in_step,
}

if __name__ == "__main__":
    for chosen in sys.argv[1:] or ["shape", "periods", "stragglers", "servers"]:
        print(json.dumps({chosen: EXPERIMENTS[chosen]()}, indent=1), flush=True)
