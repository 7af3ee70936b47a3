"""The random states of torch, NumPy and `random` as plain values that `weights_only` loading accepts."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def capture(*, cuda: bool = True) -> dict[str, Any]:
    """All three generators' states (and CUDA's)."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    version, internal, gauss_next = random.getstate()
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if cuda and torch.cuda.is_available() else [],
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


@contextmanager
def fixed(seed: int) -> Iterator[None]:
    """Draw from `seed` inside, and go on afterwards as if nothing had been drawn."""
    before = capture()
    try:
        _seed_here(seed % 2**32)
        if torch.cuda.is_available():
            torch.cuda.manual_seed_all(seed % 2**32)
        yield
    finally:
        restore(before)


def _seed_here(seed: int) -> None:
    """On the CPU alone: `torch.manual_seed` looks for absent devices, which takes 5 ms."""
    torch.default_generator.manual_seed(seed)
    np.random.seed(seed % 2**32)
    random.seed(seed)


class SeparateStream:
    """Random numbers of torch, NumPy and `random` on the CPU beside those that the process draws."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._state: dict[str, Any] | None = None

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Draw from it inside; what is outside goes on as if nothing had been drawn."""
        before = capture(cuda=False)
        if self._state is None:
            _seed_here(self._seed)
        else:
            restore(self._state)
        try:
            yield
        finally:
            self._state = capture(cuda=False)
            restore(before)


def part(seed: int | None, rank: int) -> None:
    """From here on each rank draws its own stream; rank 0 goes on with the common one. None: no change."""
    if rank:
        seed_worker(seed, rank)


def seed_worker(seed: int | None, rank: int) -> None:
    """Seed torch, NumPy and `random`: rank 0 with `seed` itself, the others differently; None: leave them."""
    if seed is not None:
        own_seed = (seed + rank * 1_000_003) % 2**32
        torch.manual_seed(own_seed)
        np.random.seed(own_seed)
        random.seed(own_seed)
