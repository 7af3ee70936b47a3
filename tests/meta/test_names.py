"""One word, one meaning: no two public classes share a name, and the glossary's words exist in the code."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "paceline"
# Names that several public classes may share, with the reason.
SHARED: dict[str, str] = dict.fromkeys(
    ("Ledger", "Meeting"), "the protocol that the layers above name, and the class that implements it"
)


def python_classes() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                found.setdefault(node.name, []).append(str(path.relative_to(ROOT)))
    return found


def core_classes() -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    # A specialisation `struct X<…> {` is the same template; `class A::B {` defines B of A.
    definition = re.compile(r"^(?:template <.*>\s*)?(?:class|struct) ([\w:]+)(?! ?<)[^;()<]*\{", re.MULTILINE)
    for path in sorted((ROOT / "csrc").rglob("*")):
        if path.suffix in (".h", ".cpp"):
            for name in definition.findall(path.read_text()):
                found.setdefault(name, []).append(str(path.relative_to(ROOT)))
    return found


def test_no_two_public_classes_of_the_package_share_a_name() -> None:
    twice = {name: places for name, places in python_classes().items() if len(places) > 1}
    assert not {n: p for n, p in twice.items() if n not in SHARED}
    assert not [n for n in SHARED if n not in twice], "SHARED names something that is no longer shared"


def test_no_two_classes_of_the_core_share_a_name() -> None:
    assert not {name: places for name, places in core_classes().items() if len(places) > 1}


def test_a_class_of_the_core_and_one_of_the_package_share_a_name_only_for_one_thing() -> None:
    """Same name, same thing seen from either side; listed in the glossary's table of both worlds."""
    both = set(python_classes()) & set(core_classes())
    glossary = (ROOT / "docs" / "glossary.md").read_text()
    assert not [name for name in sorted(both) if f"`{name}`" not in glossary]


def test_the_glossary_is_in_order_and_says_each_word_once() -> None:
    words = re.findall(r"^\| \*\*([^*]+)\*\* \|", (ROOT / "docs" / "glossary.md").read_text(), re.MULTILINE)
    assert len(words) >= 30
    assert words == sorted(words, key=str.lower)
    assert len({w.lower() for w in words}) == len(words)
