"""The architecture, executed: no circle, no arrow against the written order, light packages stay light."""

from __future__ import annotations

import ast
import subprocess
import sys

import import_graph
import pytest
from import_graph import Graph

# Each room's parts from the ground up; a part may import from earlier levels only, and parts of one level do
# not see each other. ARCHITECTURE.md says what each part is.
PYTHON: dict[str, list[set[str]]] = {
    "paceline": [
        {"__init__", "errors", "types", "_core", "local_work", "user_cache", "torch_versions", "core"},
        {"checksum"},
        {"user_input"},
        {"registry", "spec", "worker_function"},
        {"plugins", "declarations"},
        {"options"},
        {"schedule"},
        {"collectives"},
        {"comm", "codecs"},
        {"strategies"},
        {"train", "tasks"},
        {"launchers"},
        {"compat"},
        {"bench", "doctor"},
        {"report"},
        {"cli"},
        {"__main__"},
    ],
    "paceline.comm": [
        {"security"},
        {
            "__init__",
            "byte_string",
            "current",
            "fabric_operations",
            "ledger",
            "reference",
            "spread",
            "rendezvous",
        },
        {"reference_operations"},
        {"messages"},
        {"survivors", "loss_exchange", "roll_call"},
        {"communicator"},
        {"device_messages", "native", "simulated"},
        {"torch_fabric"},
        {"fabric", "process_group"},
    ],
    "paceline.launchers": [
        {"__init__", "endpoint", "function_call"},
        {"job"},
        {"processes", "manifest", "batch_script"},
        {"runner", "remote"},
        {"launch", "ray", "spark"},
        {"engines"},
    ],
    "paceline.codecs": [{"kernel"}, {"reducers"}, {"__init__"}, {"*"}],
    "paceline.strategies": [{"__init__", "base"}, {"outer", "peers", "server", "staleness"}, {"*"}],
    "paceline.cli": [
        {"__init__", "arguments", "entries"},
        {"schedule_reports", "schedule_verify"},
        {"*"},
        {"main"},
    ],
}
CORE: dict[str, list[set[str]]] = {
    "core": [
        {"base"},
        {"engine", "codecs"},
        {"shared_memory", "tcp"},
        {"network"},
        {"hierarchical"},
    ],
}
TORCH_FREE = {
    "errors",
    "types",
    "user_input",
    "user_cache",
    "registry",
    "spec",
    "plugins",
    "declarations",
    "options",
    "schedule",
    "collectives",
}


@pytest.fixture(scope="module")
def python() -> Graph:
    return import_graph.python_graph()


@pytest.fixture(scope="module")
def core() -> Graph:
    return import_graph.include_graph()


def all_circles(graph: Graph, separator: str) -> list[str]:
    found = [f"files: {' ↔ '.join(c)}" for c in import_graph.circles(graph)]
    for room in import_graph.rooms(graph, separator):
        parts = import_graph.folded(graph, room, separator)
        found += [f"parts of {room}: {' ↔ '.join(c)}" for c in import_graph.circles(parts)]
    return found


def test_no_circle_in_the_package(python: Graph) -> None:
    assert not all_circles(python, ".")


def test_no_circle_in_the_core(core: Graph) -> None:
    assert not all_circles(core, "/")


@pytest.mark.parametrize("room", PYTHON)
def test_imports_point_down(python: Graph, room: str) -> None:
    parts = import_graph.folded(python, room, ".")
    if room == "paceline":
        parts["_core"] = set()  # the compiled module
    assert not import_graph.against(parts, PYTHON[room])


@pytest.mark.parametrize("room", CORE)
def test_includes_point_down(core: Graph, room: str) -> None:
    assert not import_graph.against(import_graph.folded(core, room, "/"), CORE[room])


def test_a_planted_circle_is_found(python: Graph) -> None:
    planted = {module: set(targets) for module, targets in python.items()}
    planted["paceline.comm.ledger"].add("paceline.comm.communicator")
    assert any("paceline.comm.communicator" in c for c in all_circles(planted, "."))
    assert import_graph.against(import_graph.folded(planted, "paceline.comm", "."), PYTHON["paceline.comm"])


def test_a_circle_between_rooms_is_found_where_no_file_closes_it() -> None:
    graph: Graph = {"p.a.x": {"p.b.x"}, "p.a.y": set(), "p.b.x": set(), "p.b.y": {"p.a.y"}}
    assert not import_graph.circles(graph)
    assert all_circles(graph, ".") == ["parts of p: a ↔ b"]


def test_an_order_that_names_what_does_not_exist_is_refused() -> None:
    assert import_graph.against({"a": set()}, [{"a", "b"}]) == ["b is in the order, but not in the room"]
    assert import_graph.against({"a": set(), "c": set()}, [{"a"}]) == ["c is in no level of the order"]
    assert import_graph.against({"a": {"b"}, "b": set()}, [{"a", "b"}]) == ["a imports b"]


def at_run_time(tree: ast.AST) -> set[str]:
    """Names of the modules that a file imports, without those under TYPE_CHECKING."""
    skipped: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            skipped |= {id(n) for statement in node.body for n in ast.walk(statement)}
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) not in skipped and isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif id(node) not in skipped and isinstance(node, ast.ImportFrom):
            found.add(str(node.module))
    return found


@pytest.mark.parametrize("module", [m for m in import_graph.module_files() if m.split(".")[1:2]])
def test_light_layers_do_not_import_torch(module: str) -> None:
    if module.split(".")[1] in TORCH_FREE:
        names = at_run_time(ast.parse(import_graph.module_files()[module].read_text()))
        assert not [n for n in names if n.split(".")[0] == "torch"], f"{module} must not import torch"


def test_training_does_not_load_the_compiler() -> None:
    code = (
        "import sys, paceline.train.job\n"
        "found = {'torch._dynamo', 'triton'} & set(sys.modules)\n"
        "assert not found, f'a second of every worker: {found}'"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("statement", ["import paceline", "import paceline.cli.main"])
def test_import_is_light(statement: str) -> None:
    code = f"{statement}; import sys; assert 'torch' not in sys.modules, 'torch was imported'"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
