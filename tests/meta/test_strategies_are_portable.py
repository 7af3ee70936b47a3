"""Strategies run in virtual time too: time, waiting and chance come from their communicator and torch."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

STRATEGIES = Path(__file__).resolve().parents[2] / "src" / "paceline" / "strategies"
BANNED = {"time", "threading", "random", "asyncio", "concurrent", "multiprocessing", "queue", "socket"}


@pytest.mark.parametrize(
    "path", sorted(STRATEGIES.rglob("*.py")), ids=lambda p: str(p.relative_to(STRATEGIES))
)
def test_no_clock_thread_or_chance_of_their_own(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or ""]
        used = {name.split(".")[0] for name in names} & BANNED
        assert not used, f"{path.name}:{node.lineno} imports {used}: ask the communicator, or torch.Generator"
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            assert (node.value.id, node.attr) not in {("torch", "distributed"), ("np", "random")}
