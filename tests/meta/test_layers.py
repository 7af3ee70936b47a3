"""The architecture, executed: imports point down only, files stay small, light packages stay light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "src" / "paceline"

# A module may import its own layer and those to its left. Layers on one line do not see each other.
ORDER = [
    {"errors", "types", "registry", "spec", "options", "worker_function", "_core", "__init__"},
    {"schedule"},
    {"collectives"},
    {"comm", "codecs"},
    {"strategies"},
    {"train"},
    {"plan", "launchers", "compat", "tasks"},
    {"bench", "report", "doctor"},
    {"cli"},
]
TORCH_FREE = {"errors", "types", "registry", "spec", "options", "schedule", "collectives"}
# (importer layer, imported layer) pairs of one line of ORDER that are allowed, with the reason.
SIDEWAYS = {
    ("tasks", "launchers"): "a comparison starts workers",
    ("compat", "launchers"): "spark.fit runs its workers as an engine's job",
    ("compat", "tasks"): "spark.fit trains a task",
    ("report", "bench"): "a report reads the row types that a benchmark writes",
}


def layer_of(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def level(layer: str) -> int:
    for i, names in enumerate(ORDER):
        if layer in names:
            return i
    raise AssertionError(f"{layer} is in no layer: add it to ORDER and to ARCHITECTURE.md")


def imports(tree: ast.AST, *, runtime_only: bool) -> list[str]:
    skipped: set[int] = set()
    if runtime_only:
        for node in ast.walk(tree):
            if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
                skipped.update(id(n) for child in node.body for n in ast.walk(child))
    found = []
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "absolute imports only"
            module = node.module or ""
            found += [f"{module}.{a.name}" for a in node.names] if module == "paceline" else [module]
    return found


MODULES = sorted(PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_down(path: Path) -> None:
    relative = path.relative_to(PACKAGE)
    own = relative.parts[0] if len(relative.parts) > 1 else relative.stem
    for name in imports(ast.parse(path.read_text()), runtime_only=True):
        if name.split(".")[0] != "paceline" or name == "paceline":
            continue
        other = layer_of(name)
        if other == "__version__" or other == own or (own, other) in SIDEWAYS:
            continue
        assert level(other) < level(own) or level(own) == level(other) == 0, (
            f"{relative} ({own}) imports {name} ({other}): imports point down only"
        )


@pytest.mark.parametrize("path", MODULES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_light_layers_do_not_import_torch(path: Path) -> None:
    relative = path.relative_to(PACKAGE)
    own = relative.parts[0] if len(relative.parts) > 1 else relative.stem
    if own in TORCH_FREE:
        names = imports(ast.parse(path.read_text()), runtime_only=True)
        assert not [n for n in names if n.split(".")[0] == "torch"], f"{relative} must not import torch"


def test_no_file_outgrows_its_purpose() -> None:
    sources = [*MODULES, *(ROOT / "csrc").rglob("*.cpp"), *(ROOT / "csrc").rglob("*.h")]
    sources += [*(ROOT / "tests").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    long = {str(p.relative_to(ROOT)): n for p in sources if (n := len(p.read_text().splitlines())) > 400}
    assert not long, f"files over 400 lines: {long}"


@pytest.mark.parametrize("package", ["strategies", "strategies/staleness", "collectives", "codecs"])
def test_plugins_stay_under_200_lines(package: str) -> None:
    if not (PACKAGE / package).exists():
        return
    long = {
        p.name: n for p in (PACKAGE / package).glob("*.py") if (n := len(p.read_text().splitlines())) >= 200
    }
    assert not long, f"plug-ins of 200 lines and more: {long}"


@pytest.mark.parametrize("statement", ["import paceline", "import paceline.cli.main"])
def test_import_is_light(statement: str) -> None:
    code = f"{statement}; import sys; assert 'torch' not in sys.modules, 'torch was imported'"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
