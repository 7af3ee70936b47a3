"""Bytes per update and accuracy of ±τ updates for a 14.6-million-parameter MLP trained on MNIST.

    python benchmarks/threshold_sizes.py [--steps 800] [--workers 2] [--json out.json]
    python benchmarks/threshold_sizes.py --plot out.json [more.json]   docs/pictures/threshold_sizes.svg

Workers are emulated in one process, in turn: each computes the update of its own minibatch, encodes it, and
all decoded updates are added to the model. So the bytes and the bits per hit are those of real gradients;
delays of a real network are not in it. Rows: uncompressed, fp16, ±τ at several densities, a large fixed τ.
"density" and "bytes" are means over the whole run, "tau" is the last one.
"""

from __future__ import annotations

import argparse
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from chart import draw
from torch import nn

from paceline import codecs
from paceline.codecs.kernel import ledger

ROWS = ["", "fp16", *(f"threshold(density={d}, entropy=true)" for d in ("1e-2", "1e-3", "1e-4"))]
ROWS += ["threshold(tau=0.03, entropy=true)"]
SHARED = Path(os.environ.get("PACELINE_SHARED", Path(__file__).resolve().parents[2] / "shared"))


def mnist(path: Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    with np.load(path) as file:
        images = [torch.from_numpy(file[k]).float().view(-1, 784) / 255 for k in ("x_train", "x_test")]
        labels = [torch.from_numpy(file[k]).long() for k in ("y_train", "y_test")]
    return images[0], labels[0], images[1], labels[1]


def train(
    spec: str, data: Any, *, steps: int, workers: int, batch: int, lr: float, seed: int = 0, every: int = 100
) -> dict[str, Any]:
    images, labels, test_images, test_labels = data
    torch.manual_seed(seed)
    width = 2510
    model = nn.Sequential(
        nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
        nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10),
    )  # fmt: skip
    parameters = list(model.parameters())
    codec = codecs.make(f"error_feedback(codec={spec})" if spec == "fp16" else spec) if spec else None
    states: list[dict[str, Any]] = [{} for _ in range(workers)]
    total = torch.zeros(sum(p.numel() for p in parameters))
    generator = torch.Generator().manual_seed(seed + 1)
    curve: list[tuple[int, float]] = []
    for step in range(1, steps + 1):
        total.zero_()
        for state in states:
            chosen = torch.randint(0, len(labels), (batch,), generator=generator)
            loss = nn.functional.cross_entropy(model(images[chosen]), labels[chosen])
            update = torch.cat([g.view(-1) for g in torch.autograd.grad(loss, parameters)]).mul_(
                -lr / workers
            )
            if codec is None:
                total += update
            else:
                codec.decode(codec.encode(update, state), total, accumulate=True)
        with torch.no_grad():
            for parameter, part in zip(parameters, total.split([p.numel() for p in parameters]), strict=True):
                parameter += part.view_as(parameter)
        if step % every == 0 or step == steps:
            with torch.no_grad():
                guesses = torch.cat([model(part).argmax(1) for part in test_images.split(1000)])
            curve.append((step, 100 * (guesses == test_labels).double().mean().item()))
    row: dict[str, Any] = {"codec": spec or "fp32", "accuracy": curve[-1][1], "curve": curve}
    row |= {"parameters": total.numel(), "bytes": 4.0 * total.numel()}
    if codec is not None:
        stats = ledger.total(codec.stats(state) for state in states)
        row |= {key: stats[key] for key in ("density", "bits_per_hit", "entropy_bound_bits_per_hit")}
        row["bytes"] = stats["encoded_bytes"] / stats["encodes"]
        row["tau"] = states[0].get("tau")
    return row


def line(row: dict[str, Any]) -> str:
    less = 100 * (1 - row["bytes"] / (4 * row["parameters"]))
    sparse = ""
    if row.get("density"):
        bits, bound = row["bits_per_hit"], row["entropy_bound_bits_per_hit"]
        sparse = f"{row['tau']:9.4f}{row['density']:10.2e}{bits:9.2f}{bound:7.2f}"
    return f"{row['codec']:40}{row['bytes']:13,.0f}{less:8.2f}%{sparse:35}{row['accuracy']:9.2f}%"


def plot(rows: list[dict[str, Any]]) -> None:
    """Accuracy against megabytes that one worker sent, a curve per codec."""
    series: dict[str, list[tuple[float, float]]] = {}
    for row in rows:
        label = f"{row['codec']}: {row['bytes'] / 1e3:,.1f} kB an update"
        if row["seed"] == 0:
            series[label] = [(math.log10(row["bytes"] * step / 1e6), a) for step, a in row["curve"]]
    draw(
        "threshold_sizes",
        "14.6-million-parameter MLP, MNIST",
        "MB sent per worker",
        "test accuracy, %",
        series,
        ticks={float(e): f"{10.0**e:g}" for e in range(-1, 6)},
        bottom=60.0,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=64, help="per worker")
    parser.add_argument("--lr", type=float, default=0.2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--data", type=Path, default=SHARED / "data" / "mnist.npz")
    parser.add_argument("--rows", nargs="*", default=ROWS, help="codec specs; '' is uncompressed")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path, nargs="+", help="draw finished rows instead of training")
    options = parser.parse_args()
    if options.plot:
        rows = [row for path in options.plot for row in json.loads(path.read_text())]
        print(*map(line, rows), sep="\n")
        plot(rows)
        return
    torch.set_num_threads(options.threads)
    data, rows = mnist(options.data), []
    head = f"{'tau':>9}{'density':>10}{'bits/hit':>9}{'bound':>7}{'accuracy':>10}"
    print(f"{'':40}{'bytes/update':>13}{'less':>9}{head}", flush=True)
    for spec in options.rows:
        settings = {key: getattr(options, key) for key in ("steps", "workers", "batch", "lr", "seed")}
        rows.append({**train(spec, data, **settings), **settings})
        print(line(rows[-1]), flush=True)
        if options.json:
            options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
