"""The random states of torch, NumPy and `random` as plain values that `weights_only` loading accepts."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def capture() -> dict[str, Any]:
    """All three generators' states (and CUDA's)."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    version, internal, gauss_next = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "numpy": [name, torch.from_numpy(np.array(keys, dtype=np.int64)), position, has_gauss, gauss],
        "random": [version, list(internal), gauss_next],
    }


def restore(state: dict[str, Any]) -> None:
    """Set the random states of torch, NumPy and `random` to captured ones."""
    torch.set_rng_state(state["torch"])
    if state["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["cuda"])
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    version, internal, gauss_next = state["random"]
    random.setstate((version, tuple(internal), gauss_next))


def seed_worker(seed: int | None, rank: int) -> None:
    """Seed torch, NumPy and `random`: rank 0 with `seed` itself, the others differently; None: leave them."""
    if seed is not None:
        own_seed = (seed + rank * 1_000_003) % 2**32
        torch.manual_seed(own_seed)
        np.random.seed(own_seed)
        random.seed(own_seed)
