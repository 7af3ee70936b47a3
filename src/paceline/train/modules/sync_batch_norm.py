"""SyncBatchNorm of prepared models, on every fabric: torch's converted modules, and BatchNorm on request.

The modules stay the same objects and get a subclass of their class, which knows the job. Copies and pickles
are of torch's class again and know none: they normalise by themselves.
"""

from __future__ import annotations

import copyreg
from typing import Any

import torch
from torch import nn

from paceline.errors import ConfigError
from paceline.train.gradients.weights import GradientWeights
from paceline.train.modules.shared_statistics import forward
from paceline.types import Communicator


class Ranks:
    """The ranks of a job as they share statistics: see `shared_statistics.Exchange`."""

    def __init__(self, comm: Communicator, weights: GradientWeights) -> None:
        self._comm, self.weights = comm, weights
        # Communication is not compiled. Not before: the decorator loads the compiler, a second per worker.
        self.normalise: Any = torch.compiler.disable(_shared)  # type: ignore[no-untyped-call]

    def gather(self, own: torch.Tensor) -> torch.Tensor:
        everyone = own.new_empty(self._comm.size * own.numel())
        self._comm.all_gather(everyone, own).wait()
        return everyone.view(self._comm.size, -1)

    def add_up(self, own: torch.Tensor) -> torch.Tensor:
        self._comm.all_reduce(own).wait()
        return own

    def factor(self) -> float:
        return self.weights.factor


class _Synchronised:
    """Over a class of torch: statistics over the ranks while training."""

    ranks: Ranks | None = None

    def forward(self: Any, input: torch.Tensor) -> torch.Tensor:
        if self.ranks is None or not self.training:
            own: torch.Tensor = super().forward(input)  # type: ignore[misc]
            return own
        self._check_input_dim(input)
        shared: torch.Tensor = self.ranks.normalise(self, input)
        return shared

    def __reduce_ex__(self: Any, protocol: Any) -> Any:
        state = {name: value for name, value in vars(self).items() if name != "ranks"}
        return copyreg._reconstructor, (_plain(self), object, None), state  # type: ignore[attr-defined]  # noqa: SLF001


class SharedBatchNorm(_Synchronised, nn.SyncBatchNorm):
    """torch's converted module."""


class BatchNorm1d(_Synchronised, nn.BatchNorm1d):
    """Over [N, C] or [N, C, L]: one that `prepare(..., sync_batch_norm=True)` converted."""


class BatchNorm2d(_Synchronised, nn.BatchNorm2d):
    """The same over [N, C, H, W]."""


class BatchNorm3d(_Synchronised, nn.BatchNorm3d):
    """The same over [N, C, D, H, W]."""


_CLASSES: dict[type, type] = {
    nn.SyncBatchNorm: SharedBatchNorm,
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
}


class LinkedModules:
    """The modules of one model that share statistics; `remove` makes them torch's own again."""

    def __init__(self, modules: list[Any], comm: Communicator, weights: GradientWeights) -> None:
        self._modules = modules
        ranks = Ranks(comm, weights)
        weights.is_shared = True
        for module in modules:
            module.__class__ = _CLASSES[type(module)]
            module.ranks = ranks

    def remove(self) -> None:
        """Normalise with this rank's samples alone again."""
        for module in self._modules:
            del module.ranks
            module.__class__ = _plain(module)


def find(model: nn.Module, *, converts: bool) -> list[Any]:
    """The modules of `model` that share statistics; those with a process group of their own are torch's.

    Args:
        model: The model.
        converts: Whether BatchNorm modules do as well.
    """
    kinds = tuple(_CLASSES) if converts else (nn.SyncBatchNorm,)
    return [m for m in model.modules() if type(m) in kinds and getattr(m, "process_group", None) is None]


def check(modules: list[Any], *, waits: bool, name: str) -> None:
    """ConfigError where ranks do not wait for each other.

    Args:
        modules: Those that `find` found.
        waits: Whether the strategy's ranks do.
        name: The strategy's.
    """
    if modules and not waits:
        raise ConfigError(
            f"SyncBatchNorm makes all ranks wait for each other in every forward pass, which {name} is there"
            " to avoid: use nn.BatchNorm, or strategy='all_reduce'"
        )


def _shared(module: Any, input: torch.Tensor) -> torch.Tensor:
    ranks: Ranks = module.ranks
    return forward(module, input, ranks, has_samples=not ranks.weights.repeats)


def _plain(module: Any) -> type:
    return next(plain for plain, ours in _CLASSES.items() if type(module) is ours)
