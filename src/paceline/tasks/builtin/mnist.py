"""MNIST: 60,000 handwritten digits of 28 × 28 pixels, from a file mnist.npz.

Source: LeCun, Cortes & Burges, The MNIST database of handwritten digits, 1998.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from paceline.errors import ConfigError
from paceline.tasks.task import Task

_KEYS = ("x_train", "y_train", "x_test", "y_test")


class Pixels(nn.Module):
    """Bytes [N, 28, 28] to floats [N, 1, 28, 28] around zero: the data stays small until it is used."""

    def forward(self, images: Tensor) -> Tensor:
        """Scale by the mean and deviation of the training images."""
        return ((images.unsqueeze(1).float() / 255) - 0.1307) / 0.3081


def build(data: Path) -> Task:
    """A convolutional network of 79,000 parameters. `data`: an .npz with x_train, y_train, x_test, y_test."""
    train_set, test_set = _read(data)
    model = nn.Sequential(
        Pixels(),
        nn.Conv2d(1, 12, 5, stride=2, padding=2),
        nn.ReLU(),
        nn.Conv2d(12, 24, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(24 * 7 * 7, 64),
        nn.ReLU(),
        nn.Linear(64, 10),
    )
    return Task(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9),
        train_set=train_set,
        test_set=test_set,
        batch_size=64,
        epochs=2,
    )


def _read(path: Path) -> tuple[TensorDataset, TensorDataset]:
    try:
        with np.load(path, allow_pickle=False) as file:
            missing = [k for k in _KEYS if k not in file]
            if missing:
                raise ConfigError(
                    f"{path}: {', '.join(missing)} missing; {', '.join(_KEYS)} expected, "
                    f"got {', '.join(file.files) or 'nothing'}"
                )
            arrays = {k: file[k] for k in _KEYS}
    except ConfigError:
        raise
    except Exception as error:  # numpy and zipfile report damage in many ways
        raise ConfigError(f"{path}: not an .npz file: {error}") from None
    for part in ("train", "test"):
        x, y = arrays[f"x_{part}"], arrays[f"y_{part}"]
        if x.ndim != 3 or x.shape[1:] != (28, 28) or len(x) != len(y):
            raise ConfigError(
                f"{path}: x_{part} of shape [N, 28, 28] and y_{part} of [N] expected, "
                f"got {list(x.shape)} and {list(y.shape)}"
            )
    tensors = {k: torch.from_numpy(a) for k, a in arrays.items()}
    return (
        TensorDataset(tensors["x_train"], tensors["y_train"].long()),
        TensorDataset(tensors["x_test"], tensors["y_test"].long()),
    )
