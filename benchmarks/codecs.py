"""Codec kernels against PyTorch operators and against the machine's streaming copy, in one paired run.

    python benchmarks/codecs.py [--numel 14600000] [--repeats 15] [--only int8] [--json out.json]

Each round times every contender once, in turn; ratios are taken within a round and their median is
printed. "of copy": bytes that a kernel must move (read + write) per second over those of Tensor.copy_.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from paceline import codecs

Timed = Callable[[], Any]
DENSE = ["fp16", "bf16", "int8", "int8(stochastic=true)", "int4", "onebit"]


def torch_threshold(x: torch.Tensor, residual: torch.Tensor, tau: float, words: str) -> Timed:
    """±τ encode with tensor operators, three ways of finding the hits; the fastest counts."""
    bits = torch.empty_like(x, dtype=torch.bool)

    def by_mask() -> torch.Tensor:
        residual.add_(x)
        torch.ge(residual.abs(), tau, out=bits)
        index = bits.nonzero().view(-1)
        value = residual[index]
        residual[index] = value - value.sign() * tau
        return index.to(torch.int32) | (value < 0).to(torch.int32) << 31

    def by_two_compares() -> torch.Tensor:
        residual.add_(x)
        plus = (residual >= tau).nonzero().view(-1)
        minus = (residual <= -tau).nonzero().view(-1)
        residual.index_add_(0, plus, torch.full((plus.numel(),), -tau))
        residual.index_add_(0, minus, torch.full((minus.numel(),), tau))
        return torch.cat([plus, minus | 1 << 31])

    def by_hardshrink() -> torch.Tensor:
        residual.add_(x)
        value = torch.nn.functional.hardshrink(residual, tau)
        index = value.nonzero().view(-1)
        sign = value[index].sign()
        residual.index_add_(0, index, sign, alpha=-tau)
        return index.to(torch.int32) | (sign < 0).to(torch.int32) << 31

    return {"mask": by_mask, "two compares": by_two_compares, "hardshrink": by_hardshrink}[words]


def contenders(numel: int) -> tuple[dict[str, Timed], dict[str, float]]:
    """(name → what to time, name → bytes it must move)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(numel, generator=generator) * 1e-2
    copy, total = torch.empty(numel), torch.zeros(numel)
    timed: dict[str, Timed] = {"copy": lambda: copy.copy_(x)}
    moved: dict[str, float] = {"copy": 8.0 * numel}
    for spec in DENSE:
        for feedback in (False, True):
            codec = codecs.make(f"error_feedback(codec={spec})" if feedback else spec)
            state: dict[str, Any] = {}
            out = torch.zeros(codec.max_encoded_bytes(numel), dtype=torch.uint8)
            payload = codec.encode(x, state, out=out).clone()
            name = f"{spec} encode" + (" + error feedback" if feedback else "")
            timed[name] = lambda c=codec, s=state, o=out: c.encode(x, s, out=o)
            moved[name] = numel * (12 if feedback else 4) + payload.numel()
        timed[f"{spec} decode-accumulate"] = lambda c=codec, p=payload: c.decode(p, total, accumulate=True)
        moved[f"{spec} decode-accumulate"] = 8 * numel + payload.numel()
    for density in (1e-2, 1e-3, 1e-4):
        # x[i] = 0 mostly, so that residuals, and with them the density, stay as they are from round to round.
        tau, sparse = 1.0, torch.zeros(numel)
        hits = torch.randperm(numel, generator=generator)[: int(density * numel)]
        sparse[hits] = torch.where(torch.rand(len(hits), generator=generator) < 0.5, -tau, tau)
        noise = torch.rand(numel, generator=generator) * 0.5 - 0.25
        noise[hits] = 0
        for entropy in (False, True):
            codec = codecs.make(f"threshold(tau={tau}, entropy={str(entropy).lower()})")
            state = {"residual": noise.clone()}
            out = torch.zeros(codec.max_encoded_bytes(numel), dtype=torch.uint8)
            size = codec.encode(sparse, state, out=out).numel()
            name = f"threshold {density:g} encode" + (" + Rice" if entropy else "")
            timed[name] = lambda c=codec, s=state, o=out, v=sparse: c.encode(v, s, out=o)
            moved[name] = 12.0 * numel + size
            payload = out[:size].clone()
            timed[f"{name[:-7] if entropy else name} decode".replace(" encode", "")] = (
                lambda c=codec, p=payload: c.decode(p, total, accumulate=True)
            )
        for words in ("mask", "two compares", "hardshrink"):
            name = f"torch operators {density:g} ({words})"
            timed[name] = torch_threshold(sparse, noise.clone(), tau, words)
    topk = codecs.make("error_feedback(codec=topk(density=0.001))")
    topk_state: dict[str, Any] = {}
    timed["topk 0.001 encode + error feedback"] = lambda: topk.encode(x, topk_state)
    reference_sum = torch.zeros(numel)
    timed["torch add_ alone"] = lambda: reference_sum.add_(x)
    moved["torch add_ alone"] = 12.0 * numel
    return timed, moved


def measure(numel: int, repeats: int, only: str = "") -> list[dict[str, Any]]:
    timed, moved = contenders(numel)
    timed = {name: call for name, call in timed.items() if name == "copy" or re.search(only, name)}
    seconds: dict[str, list[float]] = {name: [] for name in timed}
    for round_ in range(repeats + 1):
        for name, call in timed.items():
            start = time.perf_counter()
            call()
            if round_ > 0:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    best = {}
    for density in (1e-2, 1e-3, 1e-4):
        rivals = [n for n in timed if n.startswith(f"torch operators {density:g} ")]
        if rivals:
            best[density] = min(rivals, key=lambda n: sum(seconds[n]))
    rows = []
    for name in timed:
        row: dict[str, Any] = {"name": name, "ms": 1e3 * statistics.median(seconds[name])}
        pairs = list(zip(seconds[name], seconds["copy"], strict=True))
        if name in moved:
            bandwidth = [moved[name] / s / (moved["copy"] / c) for s, c in pairs]
            row["of_copy"] = statistics.median(bandwidth)
            row["gb_per_s"] = moved[name] / statistics.median(seconds[name]) / 1e9
        for density, rival in best.items():
            if name.startswith(f"threshold {density:g} encode"):
                ratios = [t / s for s, t in zip(seconds[name], seconds[rival], strict=True)]
                row["times_torch"], row["torch"] = statistics.median(ratios), rival
        rows.append(row)
    return rows


def cpu() -> str:
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line]
    return names[0].partition(":")[2].strip() if names else "unknown CPU"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--numel", type=int, default=14_600_000)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument(
        "--threads", type=int, default=1, help="threads of the PyTorch operators and of copy_"
    )
    parser.add_argument("--only", default="", help="a regular expression for the names to time")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = measure(options.numel, options.repeats, options.only)
    print(f"{options.numel} float32, {options.threads} thread(s), {cpu()}, torch {torch.__version__}")
    print(f"{'':44}{'ms':>8}{'GB/s':>8}{'of copy':>9}{'x torch':>9}")
    for row in rows:
        ratio = f"{100 * row['of_copy']:8.0f}%" if "of_copy" in row else " " * 9
        speed = f"{row['gb_per_s']:8.1f}" if "gb_per_s" in row else " " * 8
        times = f"{row['times_torch']:9.1f}" if "times_torch" in row else ""
        print(f"{row['name']:44}{row['ms']:8.2f}{speed}{ratio}{times}")
    if options.json:
        options.json.write_text(json.dumps({"numel": options.numel, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
