"""Every sentence of docs/contract.md has a test."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_every_row_of_the_contract_names_a_test() -> None:
    text = (ROOT / "docs" / "contract.md").read_text()
    rows = [line for line in text.splitlines() if line.startswith("| ") and not line.startswith("| habit")]
    named = [re.search(r"`(test_\w+)` \|$", row) for row in rows]
    assert rows and all(named), [row for row, name in zip(rows, named, strict=True) if not name]
    written = "".join(p.read_text() for p in (ROOT / "tests" / "equivalence").rglob("test_*.py"))
    missing = {name[1] for name in named if name} - set(re.findall(r"def (test_\w+)", written))
    assert not missing, f"docs/contract.md names tests that do not exist: {missing}"
