"""FSDP2 with and without codecs on a text: loss by steps, and bytes that a rank hands to its groups.

    python benchmarks/fsdp_codecs.py --text tinyshakespeare.txt --ranks 2 4 --steps 400

Each configuration trains the same small transformer on the same batches, in the same processes, one after the
other; the figure is the mean loss of the last tenth of the steps, beside that of FSDP alone.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import paceline

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "train" / "torch_parallel"))

import fsdp_bodies

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "int8": {"gradients": "int8", "weights": "int8"},
    "int4 gradients": {"gradients": "int4", "weights": "int8"},
    "onebit gradients, error feedback": {
        "gradients": "error_feedback(codec=onebit(block=32))",
        "weights": "int8",
    },
}


def train(text: Tensor, vocabulary: int, steps: int, codec: dict[str, Any] | None, hybrid: bool) -> list[Any]:
    """Mean loss of the last tenth of the steps, and bytes of one rank without and with codecs."""
    rank, size = dist.get_rank(), dist.get_world_size()
    mesh, more = None, {}
    if hybrid:
        whole = init_device_mesh("cpu", (2, size // 2), mesh_dim_names=("replicate", "shard"))
        mesh = whole["shard"] if codec else whole
        more = {"across": "int8", "replicas": whole.get_group("replicate")} if codec else {}
    comm = paceline.fsdp_comm(**codec, **more) if codec else None
    make = functools.partial(fsdp_bodies.Transformer, vocabulary, length=64, width=128, layers=3)
    named = {"make": make, "characters": text, "rate": 1e-3}
    losses, model = fsdp_bodies.trained(comm, mesh, steps, rank, size, **named)
    last = losses[-max(1, steps // 10) :]
    raw = fsdp_bodies.raw_bytes(model, steps, size // 2 if hybrid else size, hybrid=hybrid)
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
