"""Every tutorial, as a reader would follow it: files are written, commands run, output held to the page's.

In a page, a block of `python` with a title is a file of that name; `sh` is run and must succeed; neighbouring
blocks of `sh` titled "on HOST" run at the same time; `text` shows lines that must have been printed, whatever
the times in them; `console` is for the reader alone.
"""

from __future__ import annotations

import itertools
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.xdist_group("processes")]
ROOT = Path(__file__).resolve().parents[2]
TUTORIALS = sorted((ROOT / "docs" / "tutorials").glob("*.md"))
BLOCK = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.DOTALL | re.MULTILINE)
LIMIT_S = 240


@dataclass(frozen=True)
class Block:
    language: str
    title: str
    body: str

    @property
    def runs_beside(self) -> bool:
        return self.language == "sh" and self.title.startswith("on ")


def blocks(page: Path) -> list[Block]:
    return [Block(*(group or "" for group in found)) for found in BLOCK.findall(page.read_text())]


@pytest.mark.parametrize("page", TUTORIALS, ids=lambda p: p.stem)
def test_its_commands_do_what_it_says(page: Path, tmp_path: Path) -> None:
    said = ""
    for block in follow(blocks(page), tmp_path):
        if isinstance(block, str):
            said = block
        else:
            missing = [
                line for line in block.body.splitlines() if shape(line) not in shape(said).splitlines()
            ]
            assert not missing, f"{page.name} shows {missing}, printed was:\n{said}"


def follow(steps: list[Block], folder: Path) -> Iterator[str | Block]:
    """Write the files and run the commands; yields what they print, and the blocks that show output."""
    for beside, group in itertools.groupby(steps, key=lambda block: block.runs_beside):
        if beside:
            together = list(group)
            hosts = len({block.title for block in together})
            for first in range(0, len(together), hosts):
                yield run(together[first : first + hosts], folder)
            continue
        for block in group:
            if block.language == "python":
                (folder / block.title).write_text(block.body)
            elif block.language == "sh":
                yield run([block], folder)
            elif block.language == "text":
                yield block


def run(together: list[Block], folder: Path) -> str:
    """What these commands print, which run at the same time; each must succeed."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "HOME": str(folder), "COLUMNS": "120", "OMP_NUM_THREADS": "1"}
    started = [
        subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", block.body.replace("host-a", "127.0.0.1")],
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for block in together
    ]
    try:
        said = [process.communicate(timeout=LIMIT_S)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    for block, process, output in zip(together, started, said, strict=True):
        assert process.returncode == 0, f"{block.body}\nended with {process.returncode}:\n{output}"
    return "\n".join(said)


def shape(text: str) -> str:
    """Lines without what may differ between two runs: times."""
    return re.sub(r"[ \t]+", " ", re.sub(r"\d+(\.\d+)? m?s\b", "# s", text))


def test_every_tutorial_is_in_the_site_and_leads_to_the_next() -> None:
    pages = re.findall(r"tutorials/(\w+)\.md", (ROOT / "mkdocs.yml").read_text())
    assert sorted(pages) == [p.stem for p in TUTORIALS]
    for page, following in itertools.pairwise(pages):
        text = (ROOT / "docs" / "tutorials" / f"{page}.md").read_text()
        assert f"]({following}.md).\n" == text[text.rindex("](") :], f"{page} does not lead to {following}"


def test_every_block_is_one_that_is_run_or_meant_for_reading() -> None:
    for page in TUTORIALS:
        for block in blocks(page):
            assert block.language in ("python", "sh", "text", "console"), (page.name, block.language)
            assert block.title or block.language != "python", f"{page.name}: a file without a name"
