"""What `prepare` was given, in any order, sorted into models, optimizers, loaders and schedulers."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader

from paceline.errors import ConfigError
from paceline.train.data.loader import ShardedLoader

_SCALERS = (torch.amp.GradScaler,)


@dataclasses.dataclass(frozen=True)
class Given:
    """The arguments of one call of `prepare`, without compilers' wrappers around models."""

    models: list[nn.Module]
    optimizers: list[torch.optim.Optimizer]
    stateful: list[tuple[str, Any]]
    """Schedulers and scalers, with the name that they get in checkpoints."""

    def optimizers_of(self, model: nn.Module) -> list[torch.optim.Optimizer]:
        """Those that hold a parameter of `model`."""
        own = {id(p) for p in model.parameters()}
        return [o for o in self.optimizers if any(id(p) in own for g in o.param_groups for p in g["params"])]


def unwrapped(model: nn.Module) -> nn.Module:
    """The user's own module, without what torch.compile put around it."""
    inner: nn.Module = getattr(model, "_orig_mod", model)
    return inner


def sort(things: Sequence[Any]) -> Given:
    """Sort what was given.

    Args:
        things: Positional arguments of `prepare`; lists and None are allowed among them.

    Raises:
        ConfigError: Something of another kind, a wrapped model, or an optimizer of other models.
    """
    models: list[nn.Module] = []
    optimizers: list[torch.optim.Optimizer] = []
    stateful: list[tuple[str, Any]] = []
    for one in (one for thing in things for one in listed(thing)):
        if isinstance(one, nn.Module):
            models.append(unwrapped(_plain(one)))
        elif isinstance(one, torch.optim.Optimizer):
            optimizers.append(one)
        elif isinstance(one, (LRScheduler, torch.optim.lr_scheduler.ReduceLROnPlateau)):
            stateful.append(("scheduler", one))
        elif isinstance(one, _SCALERS):
            stateful.append(("scaler", one))
        elif one is not None and not isinstance(one, (DataLoader, ShardedLoader)):
            raise ConfigError(
                "prepare() takes torch.nn.Modules, their optimizers, DataLoaders and schedulers, got"
                f" {type(one).__name__}"
            )
    return Given(models, optimizers, stateful)


def listed(item: object) -> list[Any]:
    """A list or tuple as a list, anything else as a list of it."""
    return list(item) if isinstance(item, (list, tuple)) else [item]


def with_loaders(thing: Any, add: Callable[[Any], Any]) -> Any:
    """`thing`, or the list that it is, with every DataLoader replaced by what `add` makes of it."""
    if isinstance(thing, (list, tuple)):
        return type(thing)(with_loaders(one, add) for one in thing)
    return add(thing) if isinstance(thing, (DataLoader, ShardedLoader)) else thing


def _plain(model: nn.Module) -> nn.Module:
    if isinstance(model, (nn.parallel.DistributedDataParallel, nn.DataParallel)):
        raise ConfigError(
            f"prepare() takes the plain module, not {type(model).__name__}: leave that wrapper out"
        )
    return model
