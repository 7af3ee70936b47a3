"""FSDP2 (fully_shard) over paceline; with four ranks also HSDP: two replicas of two shards.

torchrun --nproc-per-node 2 examples/fsdp2.py [--backend gloo]
torchrun --nproc-per-node 4 examples/fsdp2.py --replicas 2
"""

import argparse

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard


class Block(torch.nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = torch.nn.LayerNorm(width)
        self.up = torch.nn.Linear(width, 4 * width)
        self.down = torch.nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", default="paceline")
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--steps", type=int, default=10)
    chosen = parser.parse_args()

    dist.init_process_group(f"cpu:{chosen.backend}")
    rank, size = dist.get_rank(), dist.get_world_size()
    shape = (chosen.replicas, size // chosen.replicas)
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=("replicate", "shard"))
    mesh = mesh if chosen.replicas > 1 else mesh["shard"]

    torch.manual_seed(0)
    model = torch.nn.Sequential(*[Block(64) for _ in range(3)], torch.nn.Linear(64, 1))
    for block in model:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    torch.manual_seed(1 + rank)
    inputs = torch.randn(64, 64)

    for step in range(chosen.steps):
        loss = (model(inputs).squeeze(1) - inputs.sum(1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        if rank == 0:
            print(f"step {step} loss {mean.item() / size:.6f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
