"""FSDP2 with and without codecs on a text: loss by steps, and bytes that a rank hands to its groups.

    python benchmarks/fsdp_codecs.py --text tinyshakespeare.txt --ranks 2 4 --steps 400

Each configuration trains the same small transformer on the same batches, in the same processes, one after the
other; the figure is the mean loss of the last tenth of the steps, beside that of FSDP alone.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn import functional

import paceline

LENGTH, WIDTH = 64, 128
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "int8": {"gradients": "int8", "weights": "int8"},
    "int4 gradients": {"gradients": "int4", "weights": "int8"},
    "onebit gradients, error feedback": {
        "gradients": "error_feedback(codec=onebit(block=32))",
        "weights": "int8",
    },
}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention, self.join = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        heads = self.attention(self.first(x)).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        seen = functional.scaled_dot_product_attention(heads[0], heads[1], heads[2], is_causal=True)
        x = x + self.join(seen.transpose(1, 2).flatten(2))
        return x + self.down(functional.gelu(self.up(self.second(x))))


class Transformer(nn.Module):
    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        self.characters, self.places = nn.Embedding(vocabulary, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.output = nn.Linear(WIDTH, vocabulary)

    def forward(self, characters: Tensor) -> Tensor:
        x = self.characters(characters) + self.places(torch.arange(characters.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.output(x)


def train(text: Tensor, vocabulary: int, steps: int, codec: dict[str, Any] | None, hybrid: bool) -> list[Any]:
    """Mean loss of the last tenth of the steps, and bytes of one rank without and with codecs."""
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    model = Transformer(vocabulary)
    mesh, more = None, {}
    if hybrid:
        whole = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicate", "shard"))
        mesh = whole["shard"] if codec else whole
        more = {"across": "int8", "replicas": whole.get_group("replicate")} if codec else {}
    for block in model.blocks:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    comm = paceline.fsdp_comm(**codec, **more) if codec else None
    if comm is not None:
        comm.install(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for _ in range(steps):
        starts = torch.randint(len(text) - LENGTH - 1, (8 * size,), generator=generator)[rank::size]
        batch = torch.stack([text[s : s + LENGTH + 1] for s in starts])
        logits = model(batch[:, :-1])
        loss = functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean.item() / size)
    last = losses[-max(1, steps // 10) :]
    parts = size // 2 if hybrid else size
    numel = sum(p.to_local().numel() * parts for p in model.parameters() if isinstance(p, DTensor))
    # Two gathers of a shard, one scatter of the others' parts, and the shard's mean between replicas.
    raw = 4.0 * steps * numel * (2 / parts + (parts - 1) / parts + (1 / parts if hybrid else 0))
    return [sum(last) / len(last), raw, comm.sent_bytes() if comm else raw]


def worker(options: argparse.Namespace) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(f"cpu:{options.backend}")
    characters = options.text.read_text()
    known = sorted(set(characters))
    text = torch.tensor([known.index(c) for c in characters])
    rows: dict[str, Any] = {}
    size = dist.get_world_size()
    for hybrid in (False, True) if size == 4 else (False,):
        kind = "hybrid, " if hybrid else ""
        coded = {"int8": CONFIGURATIONS["int8"]} if hybrid else CONFIGURATIONS
        for name, codec in {"FSDP alone": None, **coded}.items():
            loss, raw, sent = rows[kind + name] = train(text, len(known), options.steps, codec, hybrid)
            if dist.get_rank() == 0:
                more = loss / rows[kind + "FSDP alone"][0] - 1
                said = f"loss {loss:.4f} ({more:+.2%}), {raw / sent:.2f} x fewer bytes"
                print(f"{size} ranks, {kind}{name}: {said}", flush=True)
    if dist.get_rank() == 0 and options.json:
        options.json.write_text(json.dumps(rows, indent=1))
    dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="a text file")
    parser.add_argument("--ranks", type=int, nargs="+", default=[2])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--backend", default="paceline")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if "LOCAL_RANK" in os.environ:
        worker(options)
        return
    for ranks in options.ranks:
        command = [
            sys.executable,
            "-m",
            "paceline.cli.main",
            "run",
            "-n",
            str(ranks),
            __file__,
            *sys.argv[1:],
        ]
        subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
