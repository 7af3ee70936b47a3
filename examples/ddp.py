"""DistributedDataParallel over paceline: only the backend's name differs from a gloo script.

torchrun --nproc-per-node 2 examples/ddp.py [--backend gloo]
"""

import argparse

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--backend", default="paceline")
    parser.add_argument("--steps", type=int, default=20)
    chosen = parser.parse_args()

    dist.init_process_group(chosen.backend)
    rank = dist.get_rank()
    torch.manual_seed(0)  # the same model everywhere
    model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 10))
    model = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    torch.manual_seed(1 + rank)  # other data on every rank
    inputs, labels = torch.randn(512, 64), torch.randint(10, (512,))

    for step in range(chosen.steps):
        batch = slice(32 * step % 512, 32 * step % 512 + 32)
        loss = torch.nn.functional.cross_entropy(model(inputs[batch]), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        mean /= dist.get_world_size()
        if rank == 0:
            print(f"step {step} loss {mean.item():.6f}")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
