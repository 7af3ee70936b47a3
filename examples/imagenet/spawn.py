"""DistributedDataParallel without a launcher: torch.multiprocessing.spawn starts one process per device.

python spawn.py DATA --workers 4
"""

import socket

import recipe
import torch
import torch.distributed as dist
from distributed import ddp_way, leave, run
from torch import multiprocessing


def worker(rank: int, args, address: str) -> None:
    """What each process runs; its rank is its argument, there is no launcher to ask."""
    args.local_rank = rank
    device = recipe.device_of(args)
    backend = "nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=address, rank=rank, world_size=args.workers)
    run(args, ddp_way("spawn", device))
    leave()


def main() -> None:
    parser = recipe.parser(__doc__)
    parser.add_argument("--workers", type=int, default=torch.cuda.device_count() or 2)
    args = parser.parse_args()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"tcp://127.0.0.1:{probe.getsockname()[1]}"
    multiprocessing.spawn(worker, (args, address), nprocs=args.workers)


if __name__ == "__main__":
    main()
