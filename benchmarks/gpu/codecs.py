"""Encode and decode on the GPU, as a share of the device's copy bandwidth for the bytes they must move.

Bytes: encode 4 n + payload, with error feedback 12 n + payload, decode-accumulate 8 n + payload; a copy 8 n.
Sparse payloads of words touch few elements when decoded: there only the time is given. Medians over rounds,
each between two device events; at the larger size buffers are several times larger than the cache. At the
smaller one, a bucket of 25 MiB, the time to launch from Python shows.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from paceline import codecs
from paceline.codecs.kernel import device as device_codecs
from paceline.codecs.kernel.payload import WORDS

SPECS = [
    "fp16",
    "bf16",
    "int8",
    "int8(stochastic=true)",
    "int4",
    "onebit",
    "topk(density=0.01)",
    "topk(density=0.001)",
]
DENSITIES = (1e-1, 1e-2, 1e-3)


def seconds(call: Callable[[], object], rounds: int, calls: int = 4) -> float:
    """Median seconds of one call."""
    for _ in range(2):
        call()
    times = []
    for _ in range(rounds):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            call()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop) / 1e3 / calls)
    return statistics.median(times)


def row(
    name: str, call: Callable[[], object], moved: float | None, copy: float, rounds: int
) -> dict[str, Any]:
    took = seconds(call, rounds)
    shown: dict[str, Any] = {"name": name, "us": round(1e6 * took, 1)}
    if moved is not None:
        shown["gb_per_s"] = round(moved / took / 1e9, 1)
        shown["of_copy"] = round(moved / took / copy, 3)
    return shown


def measure(numel: int, rounds: int) -> list[dict[str, Any]]:
    """Every codec on `numel` elements, and the copy that they are held against first."""
    x = torch.randn(numel, device="cuda") * 1e-3
    total = torch.zeros(numel, device="cuda")
    took = seconds(lambda: total.copy_(x), rounds)
    copy = 8.0 * numel / took
    rows = [{"name": "copy", "us": round(1e6 * took, 1), "gb_per_s": round(copy / 1e9, 1), "of_copy": 1.0}]
    for spec in SPECS:
        for feedback in (False, True):
            codec = codecs.make(f"error_feedback(codec={spec})" if feedback else spec)
            state: dict[str, Any] = {}
            out = torch.empty(codec.max_encoded_bytes(numel), dtype=torch.uint8, device="cuda")
            size = codec.encode(x, state, out=out).numel()
            moved = numel * (12.0 if feedback else 4.0) + size
            name = f"{spec} encode" + (" + error feedback" if feedback else "")
            call = lambda c=codec, s=state, o=out: c.encode(x, s, out=o)  # noqa: E731
            rows.append(row(name, call, moved, copy, rounds))
        rows += decoding(spec, out[:size].clone(), total, copy, rounds)
    for density in DENSITIES:
        rows += threshold(x, total, density, copy, rounds)
    return rows


def decoding(
    name: str, payload: torch.Tensor, total: torch.Tensor, copy: float, rounds: int
) -> list[dict[str, Any]]:
    """With the header read from the device, which waits for it, and the kernel alone."""
    header = device_codecs.read_header(payload)
    is_list = header.codec in ("topk", "threshold") and header.layout == WORDS
    moved = None if is_list else 8.0 * total.numel() + payload.numel()
    plain = lambda: codecs.decode(payload, total, accumulate=True)  # noqa: E731
    known = lambda: device_codecs.decode(payload, header, total, accumulate=True)  # noqa: E731
    return [
        row(f"{name} decode-accumulate", plain, moved, copy, rounds),
        row(f"{name} decode-accumulate, header known", known, moved, copy, rounds),
    ]


def threshold(
    x: torch.Tensor, total: torch.Tensor, density: float, copy: float, rounds: int
) -> list[dict[str, Any]]:
    """x is ±tau at some places and 0 elsewhere, so that residual and density stay as they are."""
    numel = x.numel()
    sparse = torch.zeros(numel, device="cuda")
    hits = torch.rand(numel, device="cuda") < density
    sparse[hits] = torch.where(x[hits] < 0, -1.0, 1.0)
    state: dict[str, Any] = {"residual": torch.where(hits, 0.0, torch.rand_like(x) * 0.5 - 0.25)}
    codec = codecs.make("threshold(tau=1.0)")
    out = torch.empty(codec.max_encoded_bytes(numel), dtype=torch.uint8, device="cuda")
    size = codec.encode(sparse, state, out=out).numel()
    name = f"threshold {density:g}"
    encode = lambda: codec.encode(sparse, state, out=out)  # noqa: E731
    rows = [row(f"{name} encode", encode, 12.0 * numel + size, copy, rounds)]
    return rows + decoding(name, out[:size].clone(), total, copy, rounds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--numel", type=int, nargs="*", default=[1 << 27, 6_553_600])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    found = {}
    for numel in options.numel:
        rows = found[str(numel)] = measure(numel, options.rounds)
        print(f"{numel} float32 on {torch.cuda.get_device_name()}")
        print(f"{'':52}{'µs':>10}{'GB/s':>9}{'of copy':>9}")
        for r in rows:
            speed = f"{r['gb_per_s']:9.1f}{100 * r['of_copy']:8.0f}%" if "of_copy" in r else ""
            print(f"{r['name']:52}{r['us']:10.1f}{speed}")
    if options.json:
        options.json.write_text(json.dumps({"sizes": found}, indent=1))


if __name__ == "__main__":
    main()
