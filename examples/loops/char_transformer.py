"""A character transformer: tied weights, warm-up and cosine, clipped gradients, accumulation.

python examples/loops/char_transformer.py
paceline run -n 2 examples/loops/char_transformer.py
torchrun --nproc-per-node 2 examples/loops/char_transformer.py
"""

import math

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

import paceline
from paceline import Job

TEXT = "the quick brown fox jumps over the lazy dog. " * 40
LENGTH, WIDTH, ACCUMULATION, EPOCHS, WARM_UP = 24, 16, 2, 3, 4


class Transformer(nn.Module):
    def __init__(self, num_symbols: int) -> None:
        super().__init__()
        self.symbols = nn.Embedding(num_symbols, WIDTH)
        self.places = nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, 2, 32, dropout=0.0, batch_first=True) for _ in range(2)
        )
        self.output = nn.Linear(WIDTH, num_symbols, bias=False)
        self.output.weight = self.symbols.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(LENGTH, device=x.device)
        h = self.symbols(x) + self.places(torch.arange(LENGTH, device=x.device))
        for block in self.blocks:
            h = block(h, src_mask=mask.to(h.dtype), is_causal=True)
        return self.output(h)


def windows() -> tuple[TensorDataset, int]:
    symbols = sorted(set(TEXT))
    codes = torch.tensor([symbols.index(c) for c in TEXT])
    rows = codes.unfold(0, LENGTH + 1, 17)
    return TensorDataset(rows[:, :-1].contiguous(), rows[:, 1:].contiguous()), len(symbols)


def summed_loss(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, int]:
    return functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum"), targets.numel()


def train(job: Job) -> tuple[float, nn.Module]:
    data, num_symbols = windows()
    model = Transformer(num_symbols)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    loader = DataLoader(data, batch_size=10, shuffle=True)
    steps = EPOCHS * math.ceil(len(loader) / ACCUMULATION)

    def rate(step: int) -> float:
        if step < WARM_UP:
            return (step + 1) / WARM_UP
        return 0.5 * (1 + math.cos(math.pi * (step - WARM_UP) / (steps - WARM_UP)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    model, optimizer, loader, scheduler = job.prepare(
        model, optimizer, loader, scheduler, batch="global", accumulation_steps=ACCUMULATION
    )
    for epoch in job.epochs(EPOCHS):
        model.train()
        for i, (x, y) in enumerate(loader):
            loss = functional.cross_entropy(model(x).flatten(0, 1), y.flatten()) / ACCUMULATION
            loss.backward()
            if (i + 1) % ACCUMULATION == 0 or i + 1 == len(loader):
                nn.utils.clip_grad_norm_(model.parameters(), 0.5)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
        metrics = job.evaluate(model, data, metrics={"loss": summed_loss})
        job.print(
            f"epoch {epoch + 1}: loss {metrics['loss']:.4f}, next rate {scheduler.get_last_lr()[0]:.5f}"
        )
    return metrics["loss"], model


if __name__ == "__main__":
    job = paceline.init(seed=0)
    loss, model = train(job)
    norm = nn.utils.parameters_to_vector(model.parameters()).norm().item()
    job.print(f"final loss {loss:.6f}, norm of the parameters {norm:.6f}")
