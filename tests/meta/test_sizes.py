"""Files have one purpose: plug-ins stay under 200 lines, other files under 500, functions under 60."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from paceline import registry

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "paceline"
PLUG_INS = [
    "strategies",
    "strategies/staleness",
    "collectives",
    "codecs",
    "launchers/engines",
    "train/logs/formats",
    "tasks/builtin",
]
# A command's function is the declaration of its options; what stands behind it is held to the rule.
DECLARATIONS = ["cli/verbs", "cli/benchmarks"]
CODE = [
    p
    for folder in ("src", "csrc", "tests", "benchmarks", "examples")
    for p in sorted((ROOT / folder).rglob("*"))
    if p.suffix in (".py", ".cpp", ".h")
]


def lines(path: Path) -> int:
    return len(path.read_text().splitlines())


def code_lines(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """Lines of a function without its docstring, which may describe many arguments."""
    docstring = node.body[:1] if ast.get_docstring(node) else []
    return _lines(node) - sum(map(_lines, docstring))


def _lines(node: ast.stmt) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def test_no_file_outgrows_its_purpose() -> None:
    long = {str(p.relative_to(ROOT)): n for p in CODE if (n := lines(p)) >= 500}
    assert not long, f"files of 500 lines and more: {long}"


@pytest.mark.parametrize("room", PLUG_INS)
def test_plug_ins_stay_small(room: str) -> None:
    names = registry.names(f"paceline.{room.replace('/', '.')}")
    assert names, f"{room} holds no plug-in"
    long = {n: size for n in names if (size := lines(PACKAGE / room / f"{n}.py")) >= 200}
    assert not long, f"plug-ins of 200 lines and more: {long}"


def test_functions_stay_small() -> None:
    exempt = {p for room in DECLARATIONS for p in (PACKAGE / room).glob("*.py")}
    long = {}
    for path in CODE:
        if path.suffix != ".py" or path in exempt:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and code_lines(node) > 60:
                long[f"{path.relative_to(ROOT)}:{node.lineno} {node.name}"] = code_lines(node)
    assert not long, f"functions of more than 60 lines: {long}"


def test_no_folder_holds_more_than_20_files() -> None:
    """But those of plug-ins, whose files need not know each other: adding one is all it takes."""
    folders: dict[Path, int] = {}
    for path in CODE:
        if path.parent in [PACKAGE / room for room in PLUG_INS]:
            continue
        folders[path.parent] = folders.get(path.parent, 0) + 1
    crowded = {str(f.relative_to(ROOT)): n for f, n in folders.items() if n > 20}
    assert not crowded, f"folders with more than 20 files of code: {crowded}"


def test_no_anonymous_tuple_is_splatted_into_a_call() -> None:
    """`given = (a, b); f(*given)` saves a line and hides from reader and type checker what goes where."""
    found = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for function in ast.walk(ast.parse(path.read_text())):
            if not isinstance(function, ast.FunctionDef):
                continue
            tuples = {
                target.id
                for node in ast.walk(function)
                if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple)
                for target in node.targets
                if isinstance(target, ast.Name)
                and not any(isinstance(e, ast.Starred) for e in node.value.elts)
            }
            for node in ast.walk(function):
                if isinstance(node, ast.Call):
                    for argument in node.args:
                        if (
                            isinstance(argument, ast.Starred)
                            and isinstance(argument.value, ast.Name)
                            and argument.value.id in tuples
                        ):
                            found.append(f"{path.relative_to(ROOT)}:{node.lineno} *{argument.value.id}")
    assert not found, found
