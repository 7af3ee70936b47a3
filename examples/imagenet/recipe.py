"""What all ways share: options, learning rate, the loop, exact evaluation, checkpoints, the result row.

What differs between two scripts is only the way: how processes start, who wraps the model, and how
sums cross ranks.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

import data
import model as models
import torch
from torch import Tensor, nn


def keep(total: Tensor) -> Tensor:
    """The sum over one rank."""
    return total


@dataclass
class Way:
    """Who am I, and how do sums cross ranks. Defaults: one process alone."""

    name: str
    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    sum_over_ranks: Callable[[Tensor], Tensor] = keep
    note: str = ""
    bytes_sent: Callable[[], int] = lambda: 0
    evaluate: Callable[..., dict[str, float]] | None = None
    """Replaces `evaluate(model, batches)` where a way has its own."""


def parser(description: str) -> argparse.ArgumentParser:
    """The options that every script takes."""
    p = argparse.ArgumentParser(description=description)
    add = p.add_argument
    add("data", nargs="?", help="folder with train/CLASS/*.jpg and val/CLASS/*.jpg")
    add("--synthetic", action="store_true", help="generated pictures instead of a folder")
    add("--train-samples", type=int, default=2048, help="synthetic training pictures")
    add("--val-samples", type=int, default=512, help="synthetic validation pictures")
    add("--classes", type=int, default=10, help="synthetic classes")
    add("--image-size", type=int, default=224)
    add("--arch", default="resnet50", help=f"{', '.join(models.DEPTHS)}, or a timm name")
    add("--epochs", type=int, default=90)
    add("--batch-size", type=int, default=64, help="per worker")
    add("--learning-rate", type=float, default=0.1, help="for 256 pictures a step; scaled linearly")
    add("--warmup-epochs", type=float, default=5)
    add("--momentum", type=float, default=0.9)
    add("--weight-decay", type=float, default=1e-4)
    add("--loader-workers", type=int, default=2, help="data-loading processes per worker")
    add("--seed", type=int, default=0)
    add("--checkpoint", type=Path, help="saved after every epoch by rank 0; resumed from if it exists")
    add("--json", type=Path, help="where rank 0 writes the result")
    add("--no-progress", action="store_true")
    # Old launchers pass --local_rank, newer ones --local-rank, the newest neither.
    add("--local-rank", "--local_rank", type=int, default=int(os.environ.get("LOCAL_RANK", "0")))
    return p


def classes(args: argparse.Namespace) -> int:
    """How many classes the model tells apart."""
    return args.classes if args.synthetic else len(data.sets(args)[0].classes)


def device_of(args: argparse.Namespace) -> torch.device:
    """This worker's GPU where there are any, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.cuda.set_device(args.local_rank)
    return torch.device("cuda", args.local_rank)


def optimizer_for(model: nn.Module, args: argparse.Namespace, size: int) -> torch.optim.SGD:
    """SGD at the linearly scaled learning rate (Goyal et al., 2017)."""
    scaled = args.learning_rate * args.batch_size * size / 256
    return torch.optim.SGD(
        model.parameters(), lr=scaled, momentum=args.momentum, weight_decay=args.weight_decay
    )


def schedule_for(optimizer: torch.optim.Optimizer, args: argparse.Namespace, steps_per_epoch: int):
    """Linear warm-up, then a tenth after each third of the epochs; stepped once per training step."""

    def factor(step: int) -> float:
        epoch = step / max(1, steps_per_epoch)
        if epoch < args.warmup_epochs:
            return (step + 1) / (args.warmup_epochs * steps_per_epoch + 1)
        return 0.1 ** int(epoch / max(1.0, args.epochs / 3))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


@torch.no_grad()
def evaluate(model: nn.Module, batches, way: Way) -> dict[str, float]:
    """Top-1, top-5 and mean loss of the whole set: sums and counts are reduced, never means."""
    model.eval()
    total = torch.zeros(4, dtype=torch.float64, device=way.device)
    for x, y in batches:
        x, y = x.to(way.device), y.to(way.device)
        output = model(x).float()
        best = output.topk(min(5, output.shape[1]), dim=1).indices
        hits = best.eq(y[:, None])
        loss = nn.functional.cross_entropy(output, y, reduction="sum")
        total += torch.stack(
            [hits[:, 0].sum().double(), hits.sum().double(), loss.double(), y.new_tensor(len(y))]
        )
    total = way.sum_over_ranks(total)
    model.train()
    top1, top5, loss, count = total.tolist()
    return {"top1": top1 / count, "top5": top5 / count, "loss": loss / count, "samples": count}


class Plain:
    """fp32: backward and step; mixed_precision.py replaces it."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def autocast(self):
        """The context of the forward pass."""
        return nullcontext()

    def __call__(self, loss: Tensor) -> None:
        """One update from `loss`."""
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()


def save(path: Path, **state) -> None:
    """Write beside, then rename: a killed run keeps the previous checkpoint."""
    beside = path.with_suffix(".tmp")
    with open(beside, "wb") as file:
        torch.save(state, file)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def train(args: argparse.Namespace, way: Way, model: nn.Module, optimizer, *, update=None, bare=None) -> dict:
    """Train and evaluate for `args.epochs`; returns (and writes) the result row."""
    bare = bare or getattr(model, "module", model)
    train_set, val_set = data.sets(args)
    shards = [
        data.Shard(len(train_set), way.rank, way.size, shuffle=True, seed=args.seed, drop_last=True),
        data.Shard(len(val_set), way.rank, way.size, shuffle=False, seed=0, drop_last=False),
    ]
    batches, val_batches = (
        data.loader(s, args, shard) for s, shard in zip((train_set, val_set), shards, strict=True)
    )
    schedule = schedule_for(optimizer, args, len(batches))
    update, first = update or Plain(optimizer), 0
    if args.checkpoint and args.checkpoint.exists():
        state = torch.load(args.checkpoint, map_location=way.device, weights_only=True)
        bare.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
        first = state["epoch"]
    seconds, evaluation_s, metrics = [], [], {}
    for epoch in range(first, args.epochs):
        shards[0].set_epoch(epoch)
        started = time.perf_counter()
        one_epoch(model, batches, way, update, schedule, quiet=args.no_progress, epoch=epoch)
        seconds.append(time.perf_counter() - started)
        started = time.perf_counter()
        # The bare module: a wrapper's forward may expect every rank to take part in every batch.
        metrics = way.evaluate(bare, val_batches) if way.evaluate else evaluate(bare, val_batches, way)
        evaluation_s.append(time.perf_counter() - started)
        if way.rank == 0:
            print(
                f"epoch {epoch + 1}: {seconds[-1]:.1f} s, "
                + ", ".join(f"{k} {v:.4g}" for k, v in metrics.items())
            )
            if args.checkpoint:
                save(
                    args.checkpoint,
                    model=bare.state_dict(),
                    optimizer=optimizer.state_dict(),
                    schedule=schedule.state_dict(),
                    epoch=epoch + 1,
                )
    row = result(way, metrics, seconds, evaluation_s, samples=shards[0].length * way.size)
    if way.rank == 0 and args.json:
        args.json.write_text(json.dumps(row))
    return row


def one_epoch(model, batches, way: Way, update, schedule, *, quiet: bool, epoch: int) -> None:
    """One pass over this rank's shard, with a progress line on rank 0 of a terminal."""
    import sys

    show = way.rank == 0 and not quiet and sys.stderr.isatty()
    for i, (x, y) in enumerate(batches):
        x, y = x.to(way.device, non_blocking=True), y.to(way.device, non_blocking=True)
        with update.autocast():
            loss = nn.functional.cross_entropy(model(x), y)
        update(loss)
        schedule.step()
        if show:
            print(
                f"\repoch {epoch + 1}  {i + 1}/{len(batches)}  loss {loss.item():.3f} ",
                end="",
                file=sys.stderr,
            )
    if show:
        print(file=sys.stderr)


def result(way: Way, metrics: dict, seconds: list[float], evaluation_s: list[float], samples: int) -> dict:
    """The row that a comparison reads. The first epoch warms up: it counts only when it is the only one."""
    steady = seconds[1:] or seconds or [float("nan")]
    per_epoch = sum(steady) / len(steady)
    return {
        "way": way.name,
        "workers": way.size,
        "seconds_per_epoch": per_epoch,
        "samples_per_s": samples / per_epoch,
        "evaluation_s": sum(evaluation_s) / max(1, len(evaluation_s)),
        "peak_memory_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "peak_device_memory_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
        "bytes_sent_per_worker": way.bytes_sent(),
        "note": way.note,
        **metrics,
    }
