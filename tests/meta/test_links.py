"""Documentation points at what exists: relative links, and paths of this repository in backticks."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGES = [
    ROOT / f
    for f in subprocess.run(
        ["git", "ls-files", "*.md"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.split()
]
TOP = ("src/", "csrc/", "tests/", "docs/", "benchmarks/", "examples/", ".ci/")


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_relative_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", page.read_text())
    dead = [t for t in targets if "://" not in t and not (page.parent / t).exists()]
    assert not dead, f"links to {dead}"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_paths_in_backticks_exist(page: Path) -> None:
    if page.name in ("CHANGELOG.md", "LOG.md"):  # history
        return
    words = re.findall(r"`([^`\s]+)`", page.read_text())
    paths = [w for w in words if w.startswith(TOP) and not re.search(r"[*<>{}]|NAME", w)]
    dead = [p for p in paths if not (ROOT / p).exists()]
    assert not dead, f"paths that do not exist: {dead}"
