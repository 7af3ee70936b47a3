"""Models that generated loops train, each small and in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

WIDTH = 4
D = torch.float64


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.last.weight = self.first.weight

    def forward(self, x: Any) -> Any:
        return self.last(torch.tanh(self.first(x)))


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(WIDTH, WIDTH)
        self.again = self.one

    def forward(self, x: Any) -> Any:
        return self.again(torch.tanh(self.one(x)))


class Heads(nn.Module):
    """One of two heads, by a property of the batch that differs between ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk, self.a, self.b = (nn.Linear(WIDTH, WIDTH) for _ in range(3))

    def forward(self, x: Any) -> Any:
        x = torch.tanh(self.trunk(x))
        mask = (x.sum(1, keepdim=True) > 0).to(x.dtype)
        return mask * self.a(x) + (1 - mask) * self.b(x)


class Embedding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Embedding(7, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Any) -> Any:
        return self.out(self.table((x[:, 0].abs() * 10).long() % 7))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.cell, self.out = nn.LSTM(1, WIDTH, batch_first=True), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Any) -> Any:
        return self.out(self.cell(x.unsqueeze(2))[0][:, -1])


class MixedDtype(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)
        self.scale = nn.Parameter(torch.ones(WIDTH, dtype=torch.float32))

    def forward(self, x: Any) -> Any:
        return self.b(torch.tanh(self.a(x)) * self.scale.double())


class Unused(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(WIDTH, WIDTH), nn.Linear(3, 3)

    def forward(self, x: Any) -> Any:
        return self.used(x)


class Empty(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.nothing = nn.Parameter(torch.zeros(0))
        self.flat = nn.Parameter(torch.zeros(3, 0))

    def forward(self, x: Any) -> Any:
        return self.layer(x) + self.nothing.sum() + self.flat.sum()


class Scalar(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer, self.gain = nn.Linear(WIDTH, WIDTH), nn.Parameter(torch.tensor(0.5))

    def forward(self, x: Any) -> Any:
        return self.gain * self.layer(x)


class Nested(nn.Module):
    """Returns a dictionary and lists, as many libraries' models do."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(3)])
        self.named = nn.ModuleDict({"out": nn.Linear(WIDTH, WIDTH)})

    def forward(self, x: Any) -> Any:
        hidden = []
        for block in self.blocks:
            x = torch.tanh(block(x))
            hidden.append(x)
        return {"logits": self.named["out"](x), "hidden": hidden}


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Any) -> Any:
        return checkpoint(lambda y: self.b(torch.tanh(self.a(y))), x, use_reentrant=False)


class Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Any) -> Any:
        return self.layer(torch.tanh(self.layer(x)))


class Buffers(nn.Module):
    """Constants, a mask with infinities, a counter."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("table", torch.linspace(0.1, 0.7, WIDTH))
        self.register_buffer("mask", torch.full((WIDTH, WIDTH), float("-inf")).triu(1))
        self.register_buffer("calls", torch.tensor(0))

    def forward(self, x: Any) -> Any:
        self.calls += 1
        return self.layer(x) * self.table


class Convolution(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.out = nn.Conv1d(1, 2, 3, padding=1), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Any) -> Any:
        return self.out(torch.relu(self.conv(x.unsqueeze(1))).flatten(1))


class Lora(nn.Module):
    """A frozen layer and an adapter; one adapter has rank 0."""

    def __init__(self) -> None:
        super().__init__()
        self.base = nn.Linear(WIDTH, WIDTH).requires_grad_(False)
        self.down, self.up = nn.Linear(WIDTH, 2, bias=False), nn.Linear(2, WIDTH)
        self.none = nn.Linear(WIDTH, 0)

    def forward(self, x: Any) -> Any:
        return self.base(x) + self.up(self.down(x)) + self.none(x).sum()


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.phase = nn.Parameter(torch.ones(WIDTH, dtype=torch.complex128))

    def forward(self, x: Any) -> Any:
        return (self.layer(x) * self.phase).real


class Normalised(nn.Module):
    """Statistics are of two values at least, also of a single sample."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.norm = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(2)

    def forward(self, x: Any) -> Any:
        return self.norm(self.layer(x).view(-1, 2, WIDTH // 2)).flatten(1)


class Expanded(nn.Module):
    """A buffer whose elements share memory."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)
        self.register_buffer("bias", torch.full((1,), 0.3, dtype=D).expand(WIDTH))

    def forward(self, x: Any) -> Any:
        return self.layer(x) + self.bias


class MaxNorm(Embedding):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(7, WIDTH, max_norm=1.0)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, 5), nn.Tanh(), nn.Linear(5, WIDTH))


def frozen() -> nn.Module:
    model = mlp()
    model[0].requires_grad_(False)  # type: ignore[index]
    return model


KINDS: dict[str, Callable[[], nn.Module]] = {
    "mlp": mlp, "tied": Tied, "frozen": frozen, "shared": Shared, "heads": Heads, "embedding": Embedding,
    "recurrent": Recurrent, "mixed_dtype": MixedDtype, "unused": Unused, "empty": Empty, "scalar": Scalar,
    "nested": Nested, "checkpointed": Checkpointed, "twice": Twice, "buffers": Buffers,
    "convolution": Convolution, "lora": Lora, "complex": Complex,
    "batch_norm": Normalised, "expanded": Expanded, "max_norm": MaxNorm,
}  # fmt: skip


def make(kind: str, seed: int, dtype: torch.dtype = D) -> nn.Module:
    """A model of this kind, in `dtype` where it does not say otherwise; the same for the same seed."""
    torch.manual_seed(seed)
    model = KINDS[kind]()
    if dtype == torch.float32:
        return model
    kept = {id(p) for n, p in model.named_parameters() if kind == "mixed_dtype" and n == "scale"}
    with torch.no_grad():
        for p in model.parameters():
            if p.dtype == torch.float32 and id(p) not in kept:
                p.data = p.data.double()
        for module in model.modules():
            for name, buffer in module.named_buffers(recurse=False):
                if buffer.dtype == torch.float32:
                    setattr(module, name, buffer.double())
    return model


def output(result: Any) -> Any:
    """The tensor that the loss is made from."""
    return result["logits"] + sum(result["hidden"]) if isinstance(result, dict) else result
