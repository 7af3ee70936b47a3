"""A task of one's own, for `paceline compare`: a file with a function build().

paceline compare examples/loops/own_task.py --workers 2 --strategies 'single,all_reduce,local_sgd(period=4)'
"""

import torch
from torch import nn
from torch.utils.data import Dataset, Subset

import paceline


class Parity(Dataset):
    """Rows of eight bits; the label says whether the first three have an odd sum."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.bits = torch.randint(2, (count, 8), generator=generator)

    def __len__(self) -> int:
        return len(self.bits)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        bits = self.bits[index]
        return bits.float(), bits[:3].sum() % 2


def build() -> paceline.Task:
    """Every worker calls it; loss and metrics are those of classification unless the task says otherwise."""
    data = Parity(600)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 2))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    return paceline.Task(
        model, optimizer, Subset(data, range(500)), Subset(data, range(500, 600)), batch_size=20, epochs=4
    )
