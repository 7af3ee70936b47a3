"""Hooks of mkdocs: pages outside docs/ become pages of the site, and links to them keep working.

Markdown pages refer to each other and to files as they lie in the repository. On the site README.md is the
first page, other Markdown files keep their path, and any other file that a page links to is shown as code.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer
from mkdocs.structure.files import File, Files

from paceline.cli.main import make_app

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
OUTSIDE = ("ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md")
LINK = re.compile(r"(!?\[[^\]]*\]\()([^)#\s]+)((?:#[^)]*)?\))")
FENCE = re.compile(r"^(```|~~~).*?^\1", re.DOTALL | re.MULTILINE)


def on_files(files: Files, config: Any) -> Files:
    """Add README.md, other pages outside docs/, files that pages link to, and the generated references."""
    pages = {"index.md": "README.md", **{name: name for name in OUTSIDE}}
    for folder in ("benchmarks", "examples"):
        pages |= {str(p): str(p) for p in (f.relative_to(ROOT) for f in (ROOT / folder).rglob("*.md"))}
    for place, source in pages.items():
        files.append(File.generated(config, place, content=(ROOT / source).read_text()))
    files.append(File.generated(config, "reference/command_line.md", content=command_line()))
    for kind in ("strategies", "codecs"):
        files.append(File.generated(config, f"reference/{kind}.md", content=plug_ins(kind)))
    sources = [ROOT / s for s in pages.values()] + sorted(DOCS.rglob("*.md"))
    for target in sorted({t for source in sources for t in _code_files(source)}):
        code = (ROOT / target).read_text()
        body = f"# `{target}`\n\n````{target.suffix.removeprefix('.') or 'text'}\n{code}\n````\n"
        files.append(File.generated(config, _place(target), content=body))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links as they are in the repository, rewritten to where the site has the files."""
    place = page.file.src_uri
    source = _source(place)

    def rewritten(match: re.Match[str]) -> str:
        before, target, after = match.groups()
        if "://" in target or target.startswith("mailto:"):
            return match.group()
        path = Path(os.path.normpath(source.parent / target))
        return before + os.path.relpath(_place(path), Path(place).parent) + after

    parts, end = [], 0
    for fence in FENCE.finditer(markdown):  # code is no text with links
        parts += [LINK.sub(rewritten, markdown[end : fence.start()]), fence.group()]
        end = fence.end()
    return "".join([*parts, LINK.sub(rewritten, markdown[end:])])


def command_line() -> str:
    """Every command's help, as it is printed 80 columns wide."""
    lines = ["# Command line", "", "What `paceline COMMAND --help` prints.", ""]
    for words in _commands(typer.main.get_command(make_app())):
        lines += [f"## paceline {' '.join(words)}", "", "```text", _printed(*words, "--help"), "```", ""]
    return "\n".join(lines)


def _commands(command: Any, *words: str) -> Iterator[tuple[str, ...]]:
    """The words of every command below this one; groups are no commands themselves."""
    if not hasattr(command, "commands"):
        yield words
    for name, child in getattr(command, "commands", {}).items():
        yield from _commands(child, *words, name)


def plug_ins(kind: str) -> str:
    """Every strategy or codec: the documentation of its module and of its class, without the methods."""
    lines = [f"# {kind.capitalize()}", "", f"`paceline {kind}` prints them in short.", ""]
    for path in sorted((ROOT / "src" / "paceline" / kind).glob("[!_]*.py")):
        lines += [f"## {path.stem}", "", f"::: paceline.{kind}.{path.stem}", "    options:"]
        lines += ["      show_root_heading: false", "      show_root_toc_entry: false"]
        lines += ["      heading_level: 3", "      filters: ['!^_', '!^[a-z]']", ""]
    return "\n".join(lines)


def _printed(*words: str) -> str:
    plain = os.environ | {"COLUMNS": "80", "TERM": "dumb", "NO_COLOR": "1"}
    command = [str(Path(sys.executable).with_name("paceline")), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=plain)
    return "\n".join(line.rstrip() for line in done.stdout.strip().splitlines())


def _code_files(source: Path) -> set[Path]:
    """Files other than Markdown and pictures that this page links to, relative to the repository."""
    found = set()
    for _, target, _ in LINK.findall(FENCE.sub("", source.read_text())):
        path = Path(os.path.normpath(source.parent / target))
        if "://" not in target and path.is_file() and path.suffix not in (".md", ".svg", ".png"):
            found.add(path.relative_to(ROOT))
    return found


def _place(path: Path) -> str:
    """Where the site has this file of the repository."""
    path = path.relative_to(ROOT) if path.is_absolute() else path
    if path == Path("README.md"):
        return "index.md"
    if path.parts[0] == "docs":
        return str(Path(*path.parts[1:]))
    return str(path) if path.suffix in (".md", ".svg", ".png") else f"files/{path}.md"


def _source(place: str) -> Path:
    """Where the repository has this page of the site."""
    if place == "index.md":
        return ROOT / "README.md"
    if place.startswith("files/"):
        return ROOT / place.removeprefix("files/").removesuffix(".md")
    return DOCS / place if (DOCS / place).exists() or not (ROOT / place).exists() else ROOT / place
