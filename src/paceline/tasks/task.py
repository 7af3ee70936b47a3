"""What can be trained and compared: a model, its data, its loss and its metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from paceline.errors import ConfigError
from paceline.spec import whole_number


def cross_entropy(outputs: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy of logits [..., classes] against class indices [...]."""
    return nn.functional.cross_entropy(outputs.flatten(0, -2), targets.flatten())


def accuracy(outputs: Tensor, targets: Tensor) -> tuple[Tensor, int]:
    """(number right, number) of logits [..., classes] against class indices [...]."""
    return (outputs.argmax(-1) == targets).sum(), targets.numel()


def summed_cross_entropy(outputs: Tensor, targets: Tensor) -> tuple[Tensor, int]:
    """(sum of cross entropies, number): the metric that goes with `cross_entropy`."""
    return cross_entropy(outputs, targets) * targets.numel(), targets.numel()


def _default_metrics() -> dict[str, Callable[..., Any]]:
    return {"accuracy": accuracy, "loss": summed_cross_entropy}


@dataclass
class Task:
    """One training problem; every worker builds its own. The defaults are those of classification.

    Args:
        model: What is trained; its outputs go to `loss` and `metrics`.
        optimizer: Made of `model.parameters()`; `--learning-rate` replaces its learning rate.
        train_set: Data set with `__len__` and `__getitem__`; an item is a pair (input, target).
        test_set: The same for evaluation; every sample counts once, over all workers.
        loss: Callable `(outputs, targets) -> Tensor`, a mean over the batch; default: cross entropy of logits
            [..., classes] against class indices [...].
        metrics: Names and callables `(outputs, targets) -> (sum, count)`, or torchmetrics objects. "accuracy"
            must be among them, and more is better; default: accuracy and mean loss.
        batch_size: Samples per step over all workers, unless `--batch-size` says otherwise; default 64.
        epochs: Passes over `train_set`, unless `--epochs` says otherwise; default 3.

    Raises:
        ConfigError: A field has the wrong kind, or the optimizer holds none of the model's parameters.

    Example:
        ```python
        def build() -> paceline.Task:
            model = nn.Linear(64, 10)
            return paceline.Task(model, torch.optim.SGD(model.parameters(), lr=0.1), train_set, test_set)
        ```
    """

    model: nn.Module
    optimizer: torch.optim.Optimizer
    train_set: Any
    test_set: Any
    loss: Callable[[Any, Any], Tensor] = cross_entropy
    metrics: Mapping[str, Any] = field(default_factory=_default_metrics)
    batch_size: int = 64
    epochs: int = 3

    def __post_init__(self) -> None:
        _expect("model", self.model, nn.Module, "a torch.nn.Module")
        _expect("optimizer", self.optimizer, torch.optim.Optimizer, "a torch.optim.Optimizer")
        self._check_optimizer()
        for name in ("train_set", "test_set"):
            _check_set(name, getattr(self, name))
        if not callable(self.loss):
            raise ConfigError(f"Task.loss: a callable (outputs, targets) expected, got {_kind(self.loss)}")
        _expect("metrics", self.metrics, Mapping, "a dict of name → callable")
        for name, metric in self.metrics.items():
            if not callable(metric):
                raise ConfigError(f"Task.metrics[{name!r}]: a callable expected, got {_kind(metric)}")
        if "accuracy" not in self.metrics:
            names = ", ".join(map(repr, self.metrics)) or "none"
            raise ConfigError(
                f'Task.metrics: "accuracy" is missing (got {names}); comparisons rank strategies by it'
            )
        for name in ("batch_size", "epochs"):
            whole_number(f"Task.{name}", getattr(self, name), least=1)

    def _check_optimizer(self) -> None:
        known = {id(p) for p in self.model.parameters()}
        given = [p for group in self.optimizer.param_groups for p in group["params"]]
        if not any(id(p) in known for p in given):
            raise ConfigError(
                "Task.optimizer: it holds none of the model's parameters; make it of model.parameters()"
            )


def _kind(value: Any) -> str:
    return type(value).__name__


def _expect(name: str, value: Any, kind: type, wanted: str) -> None:
    if not isinstance(value, kind):
        raise ConfigError(f"Task.{name}: {wanted} expected, got {_kind(value)}")


def _check_set(name: str, value: Any) -> None:
    if not hasattr(value, "__len__") or not hasattr(value, "__getitem__"):
        raise ConfigError(
            f"Task.{name}: a dataset with __len__ and __getitem__ expected, got {_kind(value)}; "
            "comparisons need to know the number of samples"
        )
    if len(value) == 0:
        raise ConfigError(f"Task.{name}: it has no samples")
    sample = value[0]
    if not isinstance(sample, tuple | list) or len(sample) != 2:
        raise ConfigError(f"Task.{name}[0]: a pair (input, target) expected, got {_kind(sample)}")
