"""DDP with mixed precision: fp16 with loss scaling on GPUs, bfloat16 on CPUs.

torchrun --nproc-per-node 4 mixed_precision.py DATA
"""

import model as models
import recipe
import torch
import torch.distributed as dist
from distributed import ddp_way, leave, wrap


class Mixed(recipe.Plain):
    """Autocast forward, scaled backward; an overflow skips the step on every rank alike."""

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        super().__init__(optimizer)
        self.device = device
        self.dtype = torch.float16 if device.type == "cuda" else torch.bfloat16
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.dtype == torch.float16)

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype)

    def __call__(self, loss: torch.Tensor) -> None:
        self.optimizer.zero_grad()
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()


def run(args, way: recipe.Way) -> None:
    """Build, wrap, train."""
    model = models.build(args.arch, recipe.classes(args), args.seed).to(way.device)
    optimizer = recipe.optimizer_for(model, args, way.size)
    recipe.train(args, way, wrap(model, way), optimizer, update=Mixed(optimizer, way.device))


def main() -> None:
    args = recipe.parser(__doc__).parse_args()
    device = recipe.device_of(args)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    run(args, ddp_way("mixed_precision", device))
    leave()


if __name__ == "__main__":
    main()
