"""What ranks run in test_fsdp_comm.py: a small transformer on the text of the tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional

import paceline
from paceline.errors import ConfigError

VOCABULARY, LENGTH = 64, 32


class Block(nn.Module):
    """A layer of a transformer that sees the past only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.Linear(width, 3 * width)
        self.join = nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.attention(self.first(x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True)
        x = x + self.join(seen.transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.second(x))))


class Transformer(nn.Module):
    """Characters [N, length] to logits [N, length, vocabulary]."""

    def __init__(
        self, vocabulary: int = VOCABULARY, length: int = LENGTH, width: int = 64, layers: int = 2
    ) -> None:
        super().__init__()
        self.length = length
        self.characters, self.places = nn.Embedding(vocabulary, width), nn.Embedding(length, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(layers))
        self.output = nn.Linear(width, vocabulary)

    def forward(self, characters: Tensor) -> Tensor:
        x = self.characters(characters) + self.places(torch.arange(characters.shape[1]))
        for block in self.blocks:
            x = block(x)
        logits: Tensor = self.output(x)
        return logits


def sharded(mesh: DeviceMesh | None = None, make: Callable[[], Transformer] = Transformer) -> Transformer:
    torch.manual_seed(0)
    model = make()
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def text(count: int) -> Tensor:
    """[count] characters of a grammar that can be learned: each follows from the one before, or is drawn."""
    generator = torch.Generator().manual_seed(7)
    drawn = torch.randint(VOCABULARY, (count,), generator=generator)
    is_drawn = torch.rand(count, generator=generator) < 0.1
    found = drawn.tolist()
    for i in range(1, count):
        if not is_drawn[i]:
            found[i] = (5 * found[i - 1] + 3) % VOCABULARY
    return torch.tensor(found)


def trained(
    comm: Any,
    mesh: DeviceMesh | None,
    steps: int,
    rank: int,
    size: int,
    *,
    make: Callable[[], Transformer] = Transformer,
    characters: Tensor | None = None,
    rate: float = 3e-3,
) -> tuple[list[float], Any]:
    """Losses of the job in each step, and the model; `characters` default to those of `text`."""
    model = sharded(mesh, make)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate)
    if comm is not None:
        comm.install(model, optimizer)
    if characters is None:
        characters = text(LENGTH * 2000 + 1)
    last = len(characters) - model.length - 1
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        starts = torch.randint(last, (8 * size,), generator=generator)[rank::size]
        batch = torch.stack([characters[s : s + model.length + 1] for s in starts])
        loss = functional.cross_entropy(model(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean.item() / size)
    return losses, model


def raw_bytes(model: nn.Module, steps: int, parts: int, *, hybrid: bool = False) -> float:
    """What FSDP sends without codecs over `parts` ranks, and between two replicas if it is hybrid.

    Two gathers of a shard, one scatter of the other ranks' parts, and the shard's mean between replicas.
    """
    numel = sum(p.to_local().numel() * parts for p in model.parameters() if isinstance(p, DTensor))
    return 4.0 * steps * numel * (2 / parts + (parts - 1) / parts + (1 / parts if hybrid else 0))


def compared(rank: int, size: int, gradients: str, weights: str | None, steps: int) -> dict[str, Any]:
    plain, _ = trained(None, None, steps, rank, size)
    comm = paceline.fsdp_comm(gradients, weights=weights)
    ours, model = trained(comm, None, steps, rank, size)
    return {
        "plain": plain,
        "ours": ours,
        "ratio": raw_bytes(model, steps, size) / comm.sent_bytes(),
        "stats": comm.stats(),
    }


def exact(rank: int, size: int) -> None:
    """With payloads that hold all bits that there are, the losses are those of FSDP alone."""
    torch.set_default_dtype(torch.float32)
    model, other = sharded(), sharded()
    with torch.no_grad():  # values that bf16 holds
        for p, q in zip(model.parameters(), other.parameters(), strict=True):
            p.copy_(p.to(torch.bfloat16).to(torch.float32))
            q.copy_(p)
    paceline.fsdp_comm("bf16", weights="bf16").install(other)
    batch = text(LENGTH * 4 + 1)[rank * LENGTH :][: LENGTH + 1]
    for one in (model, other):
        functional.cross_entropy(one(batch[None, :-1]).flatten(0, 1), batch[1:]).backward()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        torch.testing.assert_close(q.grad.to_local(), p.grad.to_local(), rtol=1e-2, atol=1e-3)


def interrupted(rank: int, size: int) -> None:
    """Twenty steps equal ten, a checkpoint, and ten more; the residuals are in it."""
    ends = []
    for at in (20, 10):
        comm = paceline.fsdp_comm("error_feedback(codec=onebit)", weights=None)
        model = sharded()
        comm.install(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        batch = text(LENGTH * 8 + 1)[rank * LENGTH :][: LENGTH + 1]
        for step in range(20):
            if step == at:
                state = comm.state_dict()
                comm = paceline.fsdp_comm("error_feedback(codec=onebit)", weights=None)
                again = sharded()
                again.load_state_dict(model.state_dict())
                model = again
                comm.install(model)
                comm.load_state_dict(state)
                optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
            optimizer.zero_grad()
            functional.cross_entropy(model(batch[None, :-1]).flatten(0, 1), batch[1:]).backward()
            optimizer.step()
        ends.append(torch.cat([p.to_local().flatten() for p in model.parameters()]))
    assert torch.equal(ends[0], ends[1])


def hybrid(rank: int, size: int, across: str) -> tuple[list[float], list[float], float]:
    """Losses with FSDP's own hybrid sharding and with a codec between replicas, and how these differ."""
    mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicate", "shard"))
    plain, _ = trained(None, mesh, 60, rank, size)
    replicas = mesh.get_group("replicate")
    comm = paceline.fsdp_comm("int8", across=across, replicas=replicas)
    ours, model = trained(comm, mesh["shard"], 60, rank, size)
    comm.synchronize()
    flat = torch.cat([p.to_local().flatten() for p in model.parameters()])
    both = [torch.empty_like(flat) for _ in range(2)]
    dist.all_gather(both, flat, group=replicas)
    return plain, ours, float((both[0] - both[1]).abs().max())


def interrupted_diloco(rank: int, size: int) -> None:
    """Fourteen steps equal seven, a checkpoint in the middle of a period, and seven more."""
    mesh = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicate", "shard"))
    replicas, ends = mesh.get_group("replicate"), []

    def begin() -> Any:
        comm = paceline.fsdp_comm("int8", weights=None, across="diloco(period=4)", replicas=replicas)
        model = sharded(mesh["shard"])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
        comm.install(model, optimizer)
        return comm, model, optimizer

    comm = paceline.fsdp_comm("int8", across="diloco(period=4)", replicas=replicas)
    model = sharded(mesh["shard"])
    try:
        comm.install(model)
    except ConfigError as error:
        assert "install(model, optimizer)" in str(error)
    else:
        raise AssertionError("install without the optimizer was not refused")
    comm.install(model, torch.optim.SGD(model.parameters(), lr=0.05))  # the refused call has left nothing
    batch = text(LENGTH * 8 + 1)[rank * LENGTH :][: LENGTH + 1]
    for at in (14, 7):
        comm, model, optimizer = begin()
        for step in range(14):
            if step == at:
                saved = comm.state_dict(), model.state_dict(), optimizer.state_dict()
                comm, model, optimizer = begin()
                model.load_state_dict(saved[1])
                optimizer.load_state_dict(saved[2])
                comm.load_state_dict(saved[0])
            optimizer.zero_grad()
            functional.cross_entropy(model(batch[None, :-1]).flatten(0, 1), batch[1:]).backward()
            optimizer.step()
        comm.synchronize()
        ends.append(torch.cat([p.to_local().flatten() for p in model.parameters()]))
    assert torch.equal(ends[0], ends[1])


def refusals(rank: int, size: int) -> None:
    """Of 4 ranks: what would train with wrong numbers, in silence, is refused by `install` and `load`."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))

    def layers(*, also_the_model: bool, over: DeviceMesh | None = None) -> nn.Module:
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
        fully_shard(model[0], mesh=over)
        return fully_shard(model, mesh=over) if also_the_model else model

    def refused(words: str, over: DeviceMesh | None, **more: Any) -> None:
        model = layers(also_the_model=words != "the model itself", over=over)
        try:
            paceline.fsdp_comm("int8", **more).install(model)
        except ConfigError as error:
            assert words in str(error), error
        else:
            raise AssertionError(f"not refused: {words}")

    refused("the model itself", mesh["shard"])
    shard, replicate = mesh.get_group("shard"), mesh.get_group("replicate")
    refused("hold different shards", mesh["shard"], across="int8", replicas=shard)
    refused("mesh of 2 dimensions", mesh, across="int8", replicas=replicate)
    kept = paceline.fsdp_comm("error_feedback(codec=int8)")
    kept.install(layers(also_the_model=True))
    other = paceline.fsdp_comm("int8")
    other.install(layers(also_the_model=True))
    try:
        other.load_state_dict(kept.state_dict())
    except ConfigError as error:
        assert "error_feedback" in str(error), error
    else:
        raise AssertionError("the state of another codec was loaded")
