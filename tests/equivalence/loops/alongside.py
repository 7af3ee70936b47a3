"""What generated loops do beside training the batch in hand, which must not change its weight."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from sources import Samples, batch_size_of, collate
from torch.utils.data import DataLoader

VALIDATIONS = ("validates_before", "validates_inside", "validates_after")


class Beside:
    """The part of a `Run` that a loop does at these four places of a minibatch."""

    def __init__(self, run: Any) -> None:
        self.run, self.kind = run, run.c["beside"]
        self.kept: Any = None
        if self.kind in (*VALIDATIONS, "other_loader"):
            form = run.c["batch"]
            loader: Any = DataLoader(Samples(8, form, shift=0.1), 3, collate_fn=collate(form))
            more: Any = {"batch": "global", "batch_size_of": batch_size_of(form)}
            is_counted = self.kind == "other_loader" or not run.is_alone
            self.loader = run.job.prepare(loader, **more) if is_counted else loader
            self.others = self.endless()

    def endless(self) -> Iterator[Any]:
        while True:
            yield from self.loader

    def before(self, batch: Any) -> None:
        """Before the forward pass."""
        if self.kind == "validates_before":
            self.validate()
        if self.kind == "thrown_away":
            self.run.loss(batch)

    def inside(self) -> None:
        """Between the forward pass and the backward pass."""
        if self.kind == "validates_inside":
            self.validate()

    def more(self, batch: Any) -> Any:
        """A further batch for the same step; None if there is none."""
        if self.kind == "other_loader":
            return next(self.others)
        if self.kind == "again":
            self.kept = batch if self.kept is None else self.kept
            return self.kept
        return None

    def after(self) -> None:
        """Between the backward pass and the step."""
        if self.kind == "validates_after":
            self.validate()

    def validate(self) -> None:
        models = self.run.models
        for model in models:
            model.eval()
        with torch.no_grad():
            for batch in self.loader:
                x, _ = self.run.parts(batch)
                for model in models:
                    model(x)
        for model in models:
            model.train()
