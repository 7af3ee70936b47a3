"""Paceline: any strategy by one string; the loop stays.

paceline run -n 4 paceline_style.py DATA --strategy "local_sgd(period=16)"
"""

import model as models
import recipe
import torch
from torch.nn.functional import cross_entropy

import paceline


def top(k: int):
    """A metric: how many targets are among the k best outputs, of how many."""

    def metric(outputs: torch.Tensor, targets: torch.Tensor) -> tuple[float, int]:
        best = outputs.topk(min(k, outputs.shape[1]), dim=1).indices
        return best.eq(targets[:, None]).sum().item(), len(targets)

    return metric


def total_loss(outputs: torch.Tensor, targets: torch.Tensor) -> tuple[float, int]:
    """A metric: the sum of the losses, and of how many."""
    return cross_entropy(outputs, targets, reduction="sum").item(), len(targets)


def main() -> None:
    parser = recipe.parser(__doc__)
    parser.add_argument("--strategy", default="all_reduce")
    args = parser.parse_args()
    job = paceline.init(seed=args.seed)
    way = recipe.Way("paceline_style", job.rank, job.size, recipe.device_of(args))
    model = models.build(args.arch, recipe.classes(args), args.seed).to(way.device)
    optimizer = recipe.optimizer_for(model, args, way.size)
    model, optimizer = job.prepare(model, optimizer, strategy=args.strategy)
    metrics = {"top1": top(1), "top5": top(5), "loss": total_loss}
    # The strategy's consensus model, every picture once, without disturbing the training.
    way.evaluate = lambda model, batches: job.evaluate(model, batches.dataset, metrics=metrics)
    way.bytes_sent = lambda: job.stats()["training"]["payload_bytes"]
    recipe.train(args, way, model, optimizer, bare=job.unwrap(model))
    job.synchronize()
    job.close()


if __name__ == "__main__":
    main()
