"""What cannot equal one process is refused by `prepare`, with the line that mends it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from runs import on, same_as_one_process, state
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from paceline.errors import ConfigError
from paceline.train.job import Job


def words() -> TensorDataset:
    generator = torch.Generator().manual_seed(9)
    return TensorDataset(torch.randint(0, 20, (31, 4), generator=generator))


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_embeddings_that_shrink_their_rows_in_forward(kind: Any) -> None:
    with pytest.raises(ConfigError, match=r"weight\.renorm_\(2, 0, 1\.0\)"):
        on(2, lambda job: job.prepare(kind(20, 3, max_norm=1.0)))


def test_the_line_that_mends_them() -> None:
    def loop(job: Job) -> Any:
        torch.manual_seed(1)
        net: Any = nn.Embedding(20, 3).double()
        optimizer: Any = torch.optim.SGD(net.parameters(), lr=5.0)
        net, optimizer, loader = job.prepare(net, optimizer, DataLoader(words(), 6), batch="global")
        for (x,) in loader:
            net(x).sum(2).tanh().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            with torch.no_grad():
                net.weight.renorm_(2, 0, 1.0)
        return state(net)

    same_as_one_process(loop)
