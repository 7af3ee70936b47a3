"""Gradients that wait for the end of their window in `job.accumulate`: whether the loop has changed them.

torch counts changes in place, but not those through `.data`, nor a GradScaler's: norms tell these.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import nn

# ruff: noqa: SLF001  torch's counts of changes in place, and of what a tensor is a view

CHANGED_AMID_WINDOW = (
    "gradients were changed in job.accumulate before the end of their window (clipped, unscaled, set to zero"
    " or None); write `if job.sync_gradients:` before what changes them, and optimizer.zero_grad(), which"
    " waits for the end, to clear them"
)
"""What is wrong with half a sum that was clipped, unscaled or dropped, and what mends it."""


class KeptGradients:
    """What backward left, to be compared with what is there later."""

    def __init__(self) -> None:
        self._all: list[tuple[nn.Parameter, torch.Tensor | None, int]] = []
        self._norms: list[torch.Tensor] = []

    def note(self, parameters: Sequence[nn.Parameter]) -> None:
        """Keep the gradients as they are now."""
        self._all = [(p, p.grad, 0 if p.grad is None else p.grad._version) for p in parameters]
        self._norms = _norms([gradient for _, gradient, _ in self._all])

    def forget(self) -> None:
        """They are reduced, or a further backward pass changes them."""
        self._all, self._norms = [], []

    def are_cleared(self) -> bool:
        """Whether the loop made all of them None or zero; without samples they were zero before."""
        return self.are_changed() and _are_zero([p for p, _, _ in self._all])

    def are_changed(self, arrived: nn.Parameter | None = None) -> bool:
        """Whether one of them was replaced or changed in place.

        Args:
            arrived: A parameter whose next gradient backward has just added; None: no backward pass runs.
        """
        if any(not _is_same(*one, arrived) for one in self._all):
            return True
        now = _norms([gradient for _, gradient, _ in self._all])
        return any(
            p is not arrived and not torch.allclose(a, b, rtol=0.0, atol=0.0, equal_nan=True)
            for (p, _, _), a, b in zip(self._all, now, self._norms, strict=True)
        )


class ReducedGradients:
    """Complete gradients, of which only their state is kept: who keeps one itself gets a copy in backward."""

    def __init__(self) -> None:
        self._parameters: Sequence[nn.Parameter] = ()
        self._marks: list[tuple[int, int]] = []
        self._versions: list[int] = []

    def note(self, parameters: Sequence[nn.Parameter]) -> None:
        """They are as they are now."""
        self._parameters, self._marks = parameters, _marks(parameters)
        self._versions = [p._version for p in parameters]

    def are_finite(self) -> bool:
        """Whether no gradient has an infinity or NaN in it."""
        return all(p.grad is None or bool(p.grad.isfinite().all()) for p in self._parameters)

    def parameters_moved(self) -> bool:
        """Whether a parameter has been changed since."""
        return self._versions != [p._version for p in self._parameters]

    def are_cleared(self, arrived: nn.Parameter | None = None) -> bool:
        """Whether the loop made all of them None or zero since; without samples they were zero before.

        Args:
            arrived: A parameter whose next gradient backward has just added; None: no backward pass runs.
        """
        now = _marks(self._parameters)
        if arrived is None:
            return now != self._marks and _are_zero(self._parameters)
        at = next(i for i, p in enumerate(self._parameters) if p is arrived)
        if not _are_zero([p for p in self._parameters if p is not arrived]):
            return False
        others = [i for i in range(len(now)) if i != at]
        if any(now[i] != self._marks[i] for i in others):
            return True
        if _is_sum_new(arrived):
            return False  # no other one tells, and this one cannot
        before, version = self._marks[at]  # an id may be used again: only asked where no other one tells
        return not (now[at] == (before, version + 1) and before != 0)


def _is_sum_new(arrived: nn.Parameter) -> bool:
    """Whether backward(create_graph=True) runs: what it adds to a gradient makes a new tensor."""
    gradient = arrived.grad
    return gradient is not None and (gradient.requires_grad or torch.is_grad_enabled())


def _marks(parameters: Sequence[nn.Parameter]) -> list[tuple[int, int]]:
    return [(0, 0) if g is None else (id(g), g._version) for g in (p.grad for p in parameters)]


def _are_zero(parameters: Sequence[nn.Parameter]) -> bool:
    return not any(p.grad is not None and bool(p.grad.any()) for p in parameters)


@torch.no_grad()
def _norms(gradients: Sequence[torch.Tensor | None]) -> list[torch.Tensor]:
    """One for each gradient, 0 where there is none."""
    dense = [g for g in gradients if g is not None and g.layout is torch.strided]
    found = iter(torch._foreach_norm(dense, 1) if dense else ())
    zero = torch.zeros(())
    return [zero if g is None or g.layout is not torch.strided else next(found) for g in gradients]


def _is_same(
    parameter: nn.Parameter, before: torch.Tensor | None, version: int, arrived: nn.Parameter | None
) -> bool:
    now = parameter.grad
    if before is None:
        return now is None or parameter is arrived
    if parameter is arrived and _is_sum_new(parameter):
        return True
    if now is not before or parameter is arrived:
        return now is before
    added = None if arrived is None else arrived.grad
    # Views of one buffer, as zero_grad(set_to_none=False) leaves them, share their count.
    shares = added is not None and added._base is not None and added._base is before._base
    return now._version == version + shares
