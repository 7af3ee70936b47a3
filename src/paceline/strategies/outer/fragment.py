"""A part of the model that is summed over the workers while they train on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from paceline.types import Work


@dataclass
class FragmentInFlight:
    """A fragment on its way: the mean of the workers' progress in it."""

    due: int
    """The minibatch after which it is applied."""
    progress: list[torch.Tensor]
    works: list[Work]

    def wait(self) -> None:
        """Return when the mean has arrived."""
        for work in self.works:
            work.wait()
