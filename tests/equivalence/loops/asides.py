"""What loops do beside training: by one rank alone, by one rank first, or with a seed of their own."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import torch


class Asides:
    """One of them, in one run of a loop.

    Args:
        kind: `main_first`, `on_main`, `set_seed`, `track`, or None.
        folder: Of the loop, the same on all ranks.
    """

    def __init__(self, kind: str | None, folder: Path) -> None:
        self._kind, self._folder = kind, folder
        self._found: list[Any] = []
        self._rows: list[Any] = []
        self._calls: list[int] = []

    def begin(self, job: Any) -> None:
        """Before anything is made; once more in a resumed loop."""
        if self._kind == "main_first":
            built = self._folder / "built"
            with job.main_first():
                if not built.exists():
                    with open(built, "x") as file:  # which fails if another rank has been faster
                        file.write(f"by rank {job.rank}")
                self._found = [built.read_text()]
        elif self._kind == "set_seed":
            job.set_seed(11)
            self._found = [torch.rand(3).tolist(), float(np.random.rand()), random.random()]
        elif self._kind == "track":
            job.track(self)  # the other ranks ignore it

    def note(self, job: Any, epoch: int) -> None:
        """At the end of an epoch."""
        if self._kind == "on_main":
            job.on_main(self._calls.append)(epoch)
        elif self._kind == "track":
            job.log(epochs=epoch + 1)

    def log(self, row: dict[str, Any], step: int) -> None:
        """A tracker's."""
        self._rows.append([row["epochs"], step])

    def finish(self) -> None:
        """A tracker's; the job is not closed before the results are compared."""

    def result(self, job: Any) -> list[Any]:
        """What every rank found must be what one process did, and what the others did, nothing."""
        rows, *nothing = job.gather_objects([self._rows, self._calls])
        assert not any(any(one) for one in nothing), f"ranks other than 0 did something: {nothing}"
        return [*self._found, *rows]
