"""What users configure says what each argument means; a docstring says more than the name."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import paceline
from paceline import registry
from paceline.launchers.job import JobSpec
from paceline.types import Communicator

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "paceline"
PLUG_INS = ["strategies", "strategies.staleness", "codecs"]
# Arguments of every collective, described once in the protocol's own docstring.
ENTRY_POINTS: list[Callable[..., Any]] = [
    paceline.init,
    paceline.launch,
    paceline.simulate,
    paceline.ddp_hook,
    paceline.fsdp_comm,
    paceline.Task,
    JobSpec,
]


def configurable() -> Iterator[tuple[str, Callable[..., Any]]]:
    for package in PLUG_INS:
        for name, module in registry.discover(f"paceline.{package}").items():
            for class_name, found in inspect.getmembers(module, inspect.isclass):
                if found.__module__ == module.__name__ and not class_name.startswith("_"):
                    yield f"{package}.{name}.{class_name}", found
    for entry in ENTRY_POINTS:
        yield entry.__name__, entry
    for owner in (paceline.Job, Communicator):
        for name, method in inspect.getmembers(owner, inspect.isfunction):
            if not name.startswith("_"):
                yield f"{owner.__name__}.{name}", method
    for path in ("paceline.compat.accelerate:prepare", "paceline.compat.lightning.strategy:PacelineStrategy"):
        module_name, _, attribute = path.partition(":")
        try:
            yield attribute, getattr(importlib.import_module(module_name), attribute)
        except ModuleNotFoundError:  # an extra that is not installed
            continue


SUBJECTS = dict(configurable())


@pytest.mark.parametrize("subject", SUBJECTS)
def test_every_public_argument_is_described(subject: str) -> None:
    thing = SUBJECTS[subject]
    documentation = inspect.getdoc(thing) or ""
    if inspect.isclass(thing):
        documentation += "\n" + (inspect.getdoc(thing.__init__) or "")
    try:
        arguments = [p for p in inspect.signature(thing).parameters if p != "self"]
    except ValueError:
        return
    described = set(re.findall(r"^\s+\*{0,2}(\w+)(?:, (\w+))*(?: \([^)]*\))?:", documentation, re.MULTILINE))
    words = {w for group in described for w in group if w}
    missing = [a for a in arguments if a not in words]
    assert not missing, f"{subject}: no description of {missing} under `Args:`"


def public_functions() -> Iterator[tuple[str, ast.FunctionDef | ast.ClassDef]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                yield f"{path.relative_to(ROOT)}:{node.lineno}", node


def test_no_docstring_only_repeats_the_name() -> None:
    empty = []
    for place, node in public_functions():
        text = ast.get_docstring(node)
        if text is None:
            continue
        name = set(re.findall(r"[a-z]+", node.name.lower().replace("_", " ")))
        said = set(re.findall(r"[a-z]+", text.lower())) - {
            "the",
            "a",
            "an",
            "of",
            "this",
            "its",
            "and",
            "return",
        }
        if said <= name or len(text.split()) <= 2:
            empty.append(f"{place} {node.name}: {text!r}")
    assert not empty, "docstrings that say nothing: delete them, or say something:\n" + "\n".join(empty)
