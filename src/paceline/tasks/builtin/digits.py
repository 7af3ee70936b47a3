"""Handwritten digits, 8 × 8 pixels: 1437 to train on, 360 to test. From scikit-learn; trains in seconds.

Source: Alpaydin & Kaynak, Optical Recognition of Handwritten Digits, UCI 1998.
"""

from __future__ import annotations

import torch
from torch import nn

from paceline.tasks.task import Task

_NUM_TEST = 360


def build() -> Task:
    """A small network with two hidden layers."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    x = (torch.from_numpy(images).float() / 8 - 0.6)[order]  # around zero
    y = torch.from_numpy(labels).long()[order]
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 10))
    return Task(
        model=model,
        optimizer=torch.optim.SGD(model.parameters(), lr=0.08, momentum=0.9),
        train_set=torch.utils.data.TensorDataset(x[_NUM_TEST:], y[_NUM_TEST:]),
        test_set=torch.utils.data.TensorDataset(x[:_NUM_TEST], y[:_NUM_TEST]),
        batch_size=32,
        epochs=10,
    )
