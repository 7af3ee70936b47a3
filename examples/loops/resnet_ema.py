"""A small ResNet with SyncBatchNorm and an exponential moving average of its weights, both evaluated.

python examples/loops/resnet_ema.py
paceline run -n 2 examples/loops/resnet_ema.py
torchrun --nproc-per-node 2 examples/loops/resnet_ema.py
"""

import torch
from torch import nn
from torch.nn import functional
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

import paceline
from paceline import Job


class Block(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
        )
        self.second = nn.Sequential(nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False), nn.BatchNorm2d(outputs))
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.relu(self.second(self.first(x)) + self.shortcut(x))


def pictures(count: int, seed: int) -> TensorDataset:
    """Bars in one of three directions, under noise."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(3, (count,), generator=generator)
    images = 0.3 * torch.randn(count, 1, 8, 8, generator=generator)
    for image, label in zip(images[:, 0], labels, strict=True):
        bar = {0: image[3], 1: image[:, 3], 2: image.diagonal()}[int(label)]
        bar += 1
    return TensorDataset(images, labels)


def correct(outputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, int]:
    return (outputs.argmax(1) == targets).sum(), len(targets)


def summed_loss(outputs: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, int]:
    return functional.cross_entropy(outputs, targets, reduction="sum"), len(targets)


def train(job: Job) -> tuple[dict[str, float], nn.Module, nn.Module]:
    model = nn.Sequential(
        Block(1, 6, 1), Block(6, 8, 2), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 3)
    )
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-4)
    loader = DataLoader(pictures(101, seed=1), batch_size=16, shuffle=True)
    test_set = pictures(47, seed=2)
    model, optimizer, loader = job.prepare(model, optimizer, loader, batch="global")
    average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)

    measured = {"accuracy": correct, "loss": summed_loss}
    for epoch in job.epochs(2):
        model.train()
        for x, y in loader:
            optimizer.zero_grad()
            functional.cross_entropy(model(x), y).backward()
            optimizer.step()
            average.update_parameters(model)
        own = job.evaluate(model, test_set, metrics=measured)
        ema = job.evaluate(average, test_set, metrics=measured)
        job.print(f"epoch {epoch + 1}: model {own['accuracy']:.3f}, average {ema['accuracy']:.3f}")
    return {"loss": own["loss"], "loss of the average": ema["loss"]}, model, average


if __name__ == "__main__":
    job = paceline.init(seed=0)
    losses, model, average = train(job)
    norms = [nn.utils.parameters_to_vector(m.parameters()).norm().item() for m in (model, average)]
    job.print(
        f"final loss {losses['loss']:.6f}, of the average {losses['loss of the average']:.6f},"
        f" norms of the parameters {norms[0]:.6f} and {norms[1]:.6f}"
    )
