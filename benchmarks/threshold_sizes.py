"""Bytes per update and accuracy of ±τ updates for a 14.6-million-parameter MLP trained on MNIST.

    python benchmarks/threshold_sizes.py [--steps 600] [--workers 2] [--json out.json]

Workers are emulated in one process, in turn: each computes the update of its own minibatch, encodes it, and
all decoded updates are added to the model. So the bytes and the bits per hit are those of real gradients;
delays of a real network are not in it. Rows: uncompressed, fp16, and ±τ at several densities.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from paceline import codecs
from paceline.codecs import ledger

ROWS = ["", "fp16", *(f"threshold(density={d}, entropy=true)" for d in ("1e-2", "1e-3", "1e-4"))]
SHARED = Path(os.environ.get("PACELINE_SHARED", Path(__file__).resolve().parents[2] / "shared"))


def mnist(path: Path) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    with np.load(path) as file:
        images = [torch.from_numpy(file[k]).float().view(-1, 784) / 255 for k in ("x_train", "x_test")]
        labels = [torch.from_numpy(file[k]).long() for k in ("y_train", "y_test")]
    return images[0], labels[0], images[1], labels[1]


def train(spec: str, data: Any, *, steps: int, workers: int, batch: int, lr: float) -> dict[str, Any]:
    images, labels, test_images, test_labels = data
    torch.manual_seed(0)
    width = 2510
    model = nn.Sequential(
        nn.Linear(784, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(),
        nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 10),
    )  # fmt: skip
    parameters = list(model.parameters())
    codec = codecs.make(f"error_feedback(codec={spec})" if spec == "fp16" else spec) if spec else None
    states: list[dict[str, Any]] = [{} for _ in range(workers)]
    total = torch.zeros(sum(p.numel() for p in parameters))
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
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
    with torch.no_grad():
        guesses = torch.cat([model(part).argmax(1) for part in test_images.split(1000)])
    row = {"codec": spec or "fp32", "accuracy": 100 * (guesses == test_labels).double().mean().item()}
    row |= {"parameters": total.numel(), "bytes": 4.0 * total.numel()}
    if codec is not None:
        stats = ledger.total(codec.stats(state) for state in states)
        row |= {key: stats[key] for key in ("density", "bits_per_hit", "entropy_bound_bits_per_hit")}
        row["bytes"] = stats["encoded_bytes"] / stats["encodes"]
    return row


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--batch", type=int, default=64, help="per worker")
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--data", type=Path, default=SHARED / "data" / "mnist.npz")
    parser.add_argument("--rows", nargs="*", default=ROWS, help="codec specs; '' is uncompressed")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    data = mnist(options.data)
    rows = []
    print(f"{'':40}{'bytes/update':>13}{'less':>9}{'density':>10}{'bits/hit':>9}{'bound':>7}{'accuracy':>10}")
    for spec in options.rows:
        settings = {key: getattr(options, key) for key in ("steps", "workers", "batch", "lr")}
        row = train(spec, data, **settings)
        rows.append({**row, **settings})
        less = 100 * (1 - row["bytes"] / (4 * row["parameters"]))
        sparse = ""
        if row.get("density"):
            sparse = (
                f"{row['density']:10.2e}{row['bits_per_hit']:9.2f}{row['entropy_bound_bits_per_hit']:7.2f}"
            )
        print(
            f"{row['codec']:40}{row['bytes']:13,.0f}{less:8.2f}%{sparse:26}{row['accuracy']:9.2f}%",
            flush=True,
        )
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
