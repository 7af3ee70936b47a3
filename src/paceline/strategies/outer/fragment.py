"""A part of the model that is summed over the workers while they train on."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from paceline import local_work
from paceline.types import Work


@dataclass
class FragmentInFlight:
    """A fragment on its way: the mean of the workers' progress in it."""

    due: int
    """The minibatch after which it is applied."""
    progress: list[torch.Tensor]
    """Of the fragment's tensors; last a number above zero if any rank's optimizer is of Adam's kind. One that
    has not stepped yet does not know, and all must make the same outer step."""
    works: list[Work]

    def wait(self) -> None:
        """Return when the mean has arrived."""
        for work in self.works:
            work.wait()

    def arrived(self) -> tuple[list[torch.Tensor], bool]:
        """Wait, and return the mean progress and whether the workers' optimizer is of Adam's kind."""
        self.wait()
        *progress, num_adaptive = self.progress
        return progress, bool(num_adaptive > 0)


def take(tensors: list[torch.Tensor], values: list[torch.Tensor], *, mix: float) -> None:
    """Replace `tensors` by `values`, and keep the share `mix` of what they were."""
    for tensor, value in zip(tensors, values, strict=True):
        local_work.charge_passes([tensor], 4)  # with the difference, and its mean
        if mix:
            tensor.mul_(mix).add_(value, alpha=1 - mix)
        else:
            tensor.copy_(value)
