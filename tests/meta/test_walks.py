"""ARCHITECTURE.md: every hop of the walks exists, and the tour names every file that is no plug-in."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "paceline"
TEXT = (ROOT / "ARCHITECTURE.md").read_text()
HOPS = re.findall(r"^\d+\. `([^`]+)` `([^`]+)`", TEXT, re.MULTILINE)
# Folders of plug-ins and of other projects' interfaces: each file is one of a list, not a part of the whole.
NOT_IN_THE_TOUR = (
    "strategies/*.py",
    "strategies/staleness/*.py",
    "collectives/*.py",
    "codecs/*.py",
    "launchers/engines/*.py",
    "train/logs/formats/*.py",
    "tasks/builtin/*.py",
    "cli/verbs/*.py",
    "cli/benchmarks/*.py",
    "compat/**/*.py",
    "__main__.py",
)


def defined(path: Path) -> set[str]:
    """Names that a file defines: `function`, `Class`, `Class.method`; in C++ also `Class::method`."""
    text = path.read_text()
    if path.suffix != ".py":
        return set(re.findall(r"\b((?:\w+::)*\w+)\s*[({]", text))
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.add(node.name)
            if isinstance(node, ast.ClassDef):
                found |= {f"{node.name}.{m.name}" for m in node.body if isinstance(m, ast.FunctionDef)}
    return found


def test_there_are_walks() -> None:
    assert len(re.findall(r"^### ", TEXT, re.MULTILINE)) > 5
    assert len(HOPS) > 50


@pytest.mark.parametrize(("file", "name"), HOPS, ids=lambda x: x.rsplit("/", 1)[-1])
def test_every_hop_exists(file: str, name: str) -> None:
    path = ROOT / file
    assert path.exists(), f"{file} does not exist"
    assert name in defined(path), f"{file} does not define {name}"


def test_the_tour_names_every_file() -> None:
    left_out = {p for pattern in NOT_IN_THE_TOUR for p in PACKAGE.glob(pattern)}
    parts = [p for p in PACKAGE.rglob("*.py") if p.name != "__init__.py" and p not in left_out]
    named = set(re.findall(r"^\| `([^`]+)` \|", TEXT, re.MULTILINE))
    missing = [str(p.relative_to(PACKAGE)) for p in parts if str(p.relative_to(PACKAGE)) not in named]
    assert not missing, f"not in the tour of ARCHITECTURE.md: {missing}"


def test_the_tour_names_no_file_that_is_gone() -> None:
    rows = re.findall(r"^\| `([^`]+\.py)` \|", TEXT, re.MULTILINE)
    assert not [row for row in rows if not (PACKAGE / row).exists()]
    units = re.findall(r"^\| `(csrc/[^`.]+)\.", TEXT, re.MULTILINE)
    assert units
    assert not [u for u in units if not list((ROOT / u).parent.glob(Path(u).name + ".*"))]
