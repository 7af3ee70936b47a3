"""Plain standard English: phrases that have been removed stay removed."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PHRASES = [
    "so many",
    "so few",
    "so often",
    "whoever",
    "somebody",
    "everybody",
    "anyhow",
    "anew",
    "in vain",
    "get on",
    "gets on",
    "got on",
    "a rest",
    "a word",
    "who would wait",
    "asks no second time",
    "places in them at every lap",
    "of one go",
    "can so be tested",
    "drains nothing",
    "how a worker without a server tells",
]
PATTERN = re.compile("|".join(rf"\b{p}\b" for p in PHRASES), re.IGNORECASE)


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    kinds = (".py", ".md", ".cpp", ".h", ".toml", ".txt", ".pyi")
    return [ROOT / f for f in listed.split() if f.endswith(kinds) and not f.endswith("test_prose.py")]


def test_no_phrase_of_the_list() -> None:
    found = []
    for path in tracked():
        for number, line in enumerate(path.read_text().splitlines(), 1):
            if match := PATTERN.search(line):
                found.append(f"{path.relative_to(ROOT)}:{number}: {match.group()!r}")
    assert not found, "\n".join(found)
