"""The generated loop without Paceline: one process with nothing but PyTorch, and which loops it can run."""

from __future__ import annotations

import contextlib
import copy
import itertools
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from choices import Choices
from sources import Samples, parts
from torch import nn
from torch.utils.data import DataLoader


class PlainJob:
    """One process with nothing but PyTorch, for loops whose order of samples needs no generator of ours."""

    def __init__(self) -> None:
        self.step = self.samples = self.rank = 0
        self.attachments: list[Any] = []
        self.size = 1
        self.is_main = True
        self.trackers: list[Any] = []

    def prepare(self, *things: Any, batch_size_of: Any = None, **_: Any) -> Any:
        found = tuple(_Counted(t, self, batch_size_of) if isinstance(t, DataLoader) else t for t in things)
        return found[0] if len(found) == 1 else found

    def weight(self, count: Any) -> None:
        """One process has all of it."""

    def register(self, **things: Any) -> None:
        """Nothing is saved here."""

    def accumulate(self) -> Any:
        return contextlib.nullcontext()

    def backward(self, loss: Any, **keywords: Any) -> None:
        loss.backward(**keywords)

    def gather_for_metrics(self, values: Any) -> Any:
        return values

    def gather_objects(self, value: Any) -> list[Any]:
        return [value]

    def skip(self) -> None:
        """One process knows what it trains."""

    def main_first(self) -> Any:
        return contextlib.nullcontext()

    def on_main(self, function: Any) -> Any:
        return function

    def set_seed(self, seed: int) -> None:
        torch.manual_seed(seed)
        np.random.seed(seed)
        random.seed(seed)

    def track(self, tracker: Any) -> None:
        self.trackers.append(tracker)

    def log(self, **values: Any) -> None:
        for tracker in self.trackers:
            tracker.log(values, self.step)

    def skip_first_batches(self, loader: Any, count: int) -> Any:
        loader.skipped = count
        return loader

    def save_model(self, model: nn.Module, path: Path) -> None:
        torch.save(model.state_dict(), path)

    def epochs(self, count: int) -> Iterator[int]:
        yield from range(count)

    def evaluate(
        self, model: nn.Module, data: Any, metrics: Any, *, forward: Any, average: bool = False
    ) -> dict[str, float]:
        data = DataLoader(data, 5) if isinstance(data, Samples) else getattr(data, "loader", data)
        was, buffers = model.training, copy.deepcopy(dict(model.named_buffers()))
        model.eval()
        with torch.no_grad():
            rows = [metrics["squared"](*forward(model, batch)) for batch in data]
        model.train(was)
        for name, buffer in model.named_buffers():
            if not torch.equal(buffer, buffers[name]):
                buffer.copy_(buffers[name])
        return {"squared": sum(a for a, _ in rows) / sum(b for _, b in rows)}


class _Counted:
    def __init__(self, loader: Any, job: PlainJob, batch_size_of: Any) -> None:
        self.loader, self.job, self.batch_size_of = loader, job, batch_size_of
        self.skipped = 0

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        skipped, self.skipped = self.skipped, 0
        for batch in itertools.islice(self.loader, skipped, None):
            self.job.step += 1
            count = self.batch_size_of or (lambda batch: len(parts(batch)[0]))
            self.job.samples += count(batch)
            yield batch


def is_plain(c: Choices) -> bool:
    """Whether PyTorch alone trains on the same samples in the same order."""
    is_ours = c["order"] == "shuffle" or c["data"] in ("split", "by_hand")
    if c["order"] == "batch_sampler" and (c["leaves_early"] or c["resume"]):
        return False  # torch's random sampler draws once more at its end, which PyTorch alone does not reach
    return not (is_ours or c["habit"] or c["codec"] or c["beside"] == "other_loader")
