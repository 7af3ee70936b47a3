"""The scripts under examples/loops as modules, and as commands."""

from __future__ import annotations

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "examples" / "loops"

EXACT = {
    "char_transformer": [""],
    "resnet_ema": [""],
    "gan": [""],
    "lstm_packed": [""],
    "recommender": ["--dense"],
    "no_loader": [""],
    "optimizers": ["--variant lbfgs", "--variant muon", "--variant compiled"],
    "finetune": ["--variant adapters", "--variant unfreeze"],
    "sampling": ["--variant stream", "--variant weighted", "--variant by_length"],
    "nested_batches": [""],
}
"""Scripts, and the arguments with which they train as one process does."""


def module(name: str) -> ModuleType:
    """The script, imported by its path; once, as classes that loaders' workers unpickle need a home."""
    known = f"example_loop_{name}"
    if known not in sys.modules:
        spec = importlib.util.spec_from_file_location(known, FOLDER / f"{name}.py")
        assert spec is not None and spec.loader is not None
        sys.modules[known] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[known])
    return sys.modules[known]


def environment() -> dict[str, str]:
    """For processes that train: one thread each, since the machine's cores are few."""
    return {**os.environ, "OMP_NUM_THREADS": "1"}
