"""An LSTM over sequences of different lengths, packed; the loss is a mean over tokens.

python examples/loops/lstm_packed.py
paceline run -n 2 examples/loops/lstm_packed.py
torchrun --nproc-per-node 2 examples/loops/lstm_packed.py
"""

import torch
from torch import nn
from torch.nn import functional
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence, pad_sequence
from torch.utils.data import DataLoader, Dataset

import paceline
from paceline import Job

SYMBOLS, NO_LABEL = 8, -100


class RunningSums(Dataset):
    """Sequences of digits; the label of each is the sum so far, modulo the number of symbols."""

    def __init__(self, count: int) -> None:
        generator = torch.Generator().manual_seed(0)
        lengths = torch.randint(1, 12, (count,), generator=generator)
        self.rows = [torch.randint(SYMBOLS, (int(n),), generator=generator) for n in lengths]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        row = self.rows[index]
        return row, row.cumsum(0) % SYMBOLS


def collate(items: list) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    inputs, labels = zip(*items, strict=True)
    lengths = torch.tensor([len(row) for row in inputs])
    padded = pad_sequence(labels, batch_first=True, padding_value=NO_LABEL)
    return pad_sequence(inputs, batch_first=True), lengths, padded


class Tagger(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(SYMBOLS, 12)
        self.lstm = nn.LSTM(12, 16, num_layers=2, batch_first=True)
        self.head = nn.Linear(16, SYMBOLS)

    def forward(self, x: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        packed = pack_padded_sequence(self.embedding(x), lengths, batch_first=True, enforce_sorted=False)
        hidden, _ = self.lstm(packed)
        return self.head(pad_packed_sequence(hidden, batch_first=True)[0])


def token_loss(logits: torch.Tensor, labels: torch.Tensor, reduction: str = "mean") -> torch.Tensor:
    return functional.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=NO_LABEL, reduction=reduction
    )


def train(job: Job) -> tuple[float, nn.Module]:
    data = RunningSums(90)
    model = Tagger()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    loader = DataLoader(data, batch_size=12, shuffle=True, collate_fn=collate)
    model, optimizer, loader = job.prepare(model, optimizer, loader, batch="global")
    for epoch in job.epochs(3):
        total, count = 0.0, 0
        for x, lengths, labels in loader:
            tokens = int(lengths.sum())
            job.weight(tokens)
            loss = token_loss(model(x, lengths), labels)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if loader.own_samples:  # else this rank repeats another batch, which counts for nothing
                total, count = total + loss.item() * tokens, count + tokens
        mean = job.all_reduce_metrics({"loss": (total, count)})["loss"]
        job.print(f"epoch {epoch + 1}: loss per token {mean:.4f}")
    return mean, model


if __name__ == "__main__":
    job = paceline.init(seed=0)
    loss, model = train(job)
    norm = nn.utils.parameters_to_vector(model.parameters()).norm().item()
    job.print(f"final loss {loss:.6f}, norm of the parameters {norm:.6f}")
