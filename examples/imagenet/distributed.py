"""DistributedDataParallel: one process per device, gradients all-reduced in buckets during backward.

torchrun --nproc-per-node 4 distributed.py DATA
python distributed.py DATA --init tcp://HOST:PORT --rank R --world-size N
"""

import os

import model as models
import recipe
import torch
import torch.distributed as dist

# Imported after init_process_group (as optimizers do), this module would keep the group alive until exit.
import torch.distributed.nn
from torch.nn.parallel import DistributedDataParallel


def ddp_way(name: str, device: torch.device) -> recipe.Way:
    """The initialised process group as a Way."""

    def total(x):
        dist.all_reduce(x)
        return x

    return recipe.Way(name, dist.get_rank(), dist.get_world_size(), device, total)


def wrap(model, way: recipe.Way) -> DistributedDataParallel:
    """DDP, and a count of the bytes it hands to the network: every gradient once a step."""
    ids = [way.device.index] if way.device.type == "cuda" else None
    ddp = DistributedDataParallel(model, device_ids=ids)
    per_step = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    steps = [0]
    ddp.register_forward_pre_hook(lambda module, _: steps.__setitem__(0, steps[0] + module.training))
    way.bytes_sent = lambda: per_step * steps[0]
    return ddp


def leave() -> None:
    """End together: an early leaver could take the store from a rank that still closes its connections."""
    dist.barrier()
    dist.destroy_process_group()


def run(args, way: recipe.Way) -> None:
    """Build, wrap, train."""
    model = models.build(args.arch, recipe.classes(args), args.seed).to(way.device)
    optimizer = recipe.optimizer_for(model, args, way.size)
    recipe.train(args, way, wrap(model, way), optimizer)


def main() -> None:
    parser = recipe.parser(__doc__)
    parser.add_argument("--init", default="env://", help="env:// under a launcher, or tcp://HOST:PORT")
    parser.add_argument("--rank", type=int, default=int(os.environ.get("RANK", "0")))
    parser.add_argument("--world-size", type=int, default=int(os.environ.get("WORLD_SIZE", "1")))
    args = parser.parse_args()
    device = recipe.device_of(args)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=args.init, rank=args.rank, world_size=args.world_size)
    run(args, ddp_way("distributed", device))
    leave()


if __name__ == "__main__":
    main()
