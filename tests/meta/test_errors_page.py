"""Every class of `errors.py` has a code, and a section that `paceline errors` prints."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from paceline import errors
from paceline.compat.horovod.constants import HorovodInternalError

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "src" / "paceline" / "errors.md"
KINDS = {
    name: kind
    for name, kind in inspect.getmembers(errors, inspect.isclass)
    if kind.__module__ == errors.__name__
}
HEADINGS = ("Meaning", "Usual causes", "Find the cause", "What to do")
PACELINE = (sys.executable, "-m", "paceline.cli.main")


def section(name: str) -> str:
    title = f"## {KINDS[name].code} {name}\n"
    assert PAGE.read_text().count(title) == 1, f"errors.md has no section {title!r}"
    return PAGE.read_text().partition(title)[2].partition("\n## ")[0]


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "COLUMNS": "80"}
    return subprocess.run(
        [*PACELINE, *arguments], check=False, capture_output=True, text=True, timeout=60, env=environment
    )


def test_each_class_has_a_code_of_its_own() -> None:
    codes = [vars(kind).get("code") for kind in KINDS.values()]
    assert len(KINDS) > 10 and len(set(codes)) == len(codes)
    assert all(re.fullmatch(r"PL\d\d", str(code)) for code in codes)
    assert HorovodInternalError.code == errors.PacelineError.code, "a class elsewhere has its base's"


@pytest.mark.parametrize("name", KINDS)
def test_each_class_has_a_section_with_all_parts(name: str) -> None:
    text = section(name)
    for heading in HEADINGS:
        assert re.search(rf"^\*\*{heading}\.\*\* .", text, re.MULTILINE), f"{name}: no {heading}"
    assert re.search(r"^Example:\n\n    \S", text, re.MULTILINE), f"{name}: no example"


def test_the_page_explains_nothing_else() -> None:
    titles = re.findall(r"^## (.+)$", PAGE.read_text(), re.MULTILINE)
    assert titles == sorted(titles) == sorted(f"{kind.code} {name}" for name, kind in KINDS.items())


def test_the_page_in_docs_is_the_one_in_the_package() -> None:
    copy = ROOT / "docs" / "errors.md"
    assert copy.read_text() == PAGE.read_text(), "run `make docs`, which copies src/paceline/errors.md"


@pytest.mark.parametrize("name", ["PL03", "peerlost"])
def test_the_command_prints_a_section(name: str) -> None:
    done = run("errors", name)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("PL03 PeerLost\n\nMeaning. ")
    assert done.stdout.split()[2:] == section("PeerLost").replace("**", "").split()
    assert max(map(len, done.stdout.splitlines())) <= 80


def test_the_command_lists_all_codes_and_refuses_others() -> None:
    done = run("errors")
    assert re.findall(r"^PL\d\d \w+$", done.stdout, re.MULTILINE) == sorted(
        f"{kind.code} {name}" for name, kind in KINDS.items()
    )
    wrong = run("errors", "PL99")
    assert wrong.returncode == 2 and "unknown error 'PL99'" in wrong.stderr


def test_a_command_that_fails_ends_with_its_code() -> None:
    done = run("run", "missing.py")
    assert done.stderr.rstrip().endswith("(more: paceline errors PL01)")
    assert done.stderr.count("PL01") == 1


@pytest.mark.parametrize(
    ("line", "kind"),
    [
        ("paceline.errors.PeerLost: rank 0: all_reduce #3: rank 1 is gone", errors.PeerLost),
        ("paceline.errors.Timeout", errors.Timeout),
        ("paceline.errors.re: no error", None),
        ("paceline.errors.RunLengthWarning: not an error", None),
        ("ValueError: paceline.errors.PeerLost", None),
        ("", None),
    ],
)
def test_the_class_is_found_in_the_last_line(line: str, kind: type[errors.PacelineError] | None) -> None:
    assert errors.named_in(line) is kind
