"""The optimizers of generated loops, those that users write around torch's included."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from choices import Choices
from torch import nn


class Subclass(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Wrapper(torch.optim.Optimizer):
    """Around another optimizer, without the constructor of its class."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        self.inner = inner
        self.param_groups, self.state, self.defaults = inner.param_groups, inner.state, inner.defaults

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inner.zero_grad(set_to_none)


class Lookahead(Wrapper):
    """Slow weights that follow the inner optimizer's every second step."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__(inner)
        self.slow = [[p.detach().clone() for p in group["params"]] for group in inner.param_groups]
        self.steps = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        result = self.inner.step(closure)
        self.steps += 1
        if self.steps % 2 == 0:
            for group, slow in zip(self.param_groups, self.slow, strict=True):
                for p, q in zip(group["params"], slow, strict=True):
                    q.lerp_(p, 0.5)
                    p.copy_(q)
        return result


MAKERS: dict[str, Any] = {
    "sgd": lambda ps: torch.optim.SGD(ps, lr=0.1),
    "momentum": lambda ps: torch.optim.SGD(ps, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda ps: torch.optim.Adam(ps, lr=0.01, eps=1e-3),
    "adamw": lambda ps: torch.optim.AdamW(ps, lr=0.01, eps=1e-3),
    "rmsprop": lambda ps: torch.optim.RMSprop(ps, lr=0.01, eps=1e-3),
    "adagrad": lambda ps: torch.optim.Adagrad(ps, lr=0.05, eps=1e-3),
    "lbfgs": lambda ps: torch.optim.LBFGS(ps, lr=0.1, max_iter=3),
    "subclass": lambda ps: Subclass(ps, lr=0.1),
    "wrapper": lambda ps: Wrapper(torch.optim.SGD(ps, lr=0.1)),
    "lookahead": lambda ps: Lookahead(torch.optim.SGD(ps, lr=0.1)),
    "numpy_lr": lambda ps: torch.optim.SGD(ps, lr=np.float64(0.1)),
}  # fmt: skip


def parameters_of(optimizer: Any) -> list[Any]:
    """What an optimizer trains."""
    return [p for group in optimizer.param_groups for p in group["params"]]


def optimizers_of(c: Choices, models: list[nn.Module]) -> list[Any]:
    """New optimizers for the trained parameters of the models; as many for each of them."""
    kind = c["optimizer"]
    make_one = MAKERS.get(kind, MAKERS["momentum"])
    trained = [[p for p in m.parameters() if p.requires_grad] for m in models]
    if kind == "shared":
        return [make_one([p for ps in trained for p in ps])]
    if kind == "groups":
        return [
            torch.optim.SGD([{"params": ps[:1], "lr": 0.05}, {"params": ps[1:]}], lr=0.1) for ps in trained
        ]
    if kind == "several":
        return [o for ps in trained for o in (MAKERS["adam"](ps[:1]), MAKERS["momentum"](ps[1:]))]
    return [make_one(ps) for ps in trained]
