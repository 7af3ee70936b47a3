"""Who imports whom, in the package and in the C++ core: graphs, circles, and arrows against a written order.

A node is a module (`paceline.comm.ledger`) or a C++ file (`core/base/sync.h`). All imports count, also those
inside functions and under TYPE_CHECKING: a part that needs the whole even as a type hint is tied to it.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SOURCE = ROOT / "src"
Graph = dict[str, set[str]]


def module_name(path: Path) -> str:
    """`src/paceline/comm/__init__.py` → `paceline.comm`."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def module_files() -> dict[str, Path]:
    return {module_name(p): p for p in sorted((SOURCE / "paceline").rglob("*.py"))}


def python_graph() -> Graph:
    files = module_files()
    graph: Graph = {}
    for module, path in files.items():
        found: set[str] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: absolute imports only"
                names = [f"{node.module}.{alias.name}" for alias in node.names]
                found |= {n if n in files else str(node.module) for n in names}
        graph[module] = {m for m in found if m in files} - {module}
    return graph


def include_graph() -> Graph:
    folder = ROOT / "csrc"
    files = {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.suffix in (".h", ".cpp")}
    graph: Graph = {}
    for name, path in files.items():
        included = re.findall(r'^#include "([^"]+)"', path.read_text(), re.MULTILINE)
        unknown = [i for i in included if i not in files]
        assert not unknown, f"{name} includes {unknown}, which do not exist under csrc"
        graph[name] = set(included)
    return graph


def circles(graph: Mapping[str, Iterable[str]]) -> list[list[str]]:
    """The strongly connected components with more than one node (Tarjan, without recursion)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found = []
    for start in graph:
        if start in index:
            continue
        work = [(start, iter(sorted(graph[start])))]
        index[start] = low[start] = len(index)
        stack.append(start)
        while work:
            node, successors = work[-1]
            for successor in successors:
                if successor not in index:
                    index[successor] = low[successor] = len(index)
                    stack.append(successor)
                    work.append((successor, iter(sorted(graph.get(successor, ())))))
                    break
                if successor in stack:
                    low[node] = min(low[node], index[successor])
            else:
                work.pop()
                if work:
                    low[work[-1][0]] = min(low[work[-1][0]], low[node])
                if low[node] == index[node]:
                    component = stack[stack.index(node) :]
                    del stack[stack.index(node) :]
                    if len(component) > 1:
                        found.append(sorted(component))
    return found


def child(node: str, room: str, separator: str) -> str | None:
    """The part of `room` that `node` belongs to; `__init__` for the room itself, None outside it."""
    if node == room:
        return "__init__"
    prefix = room + separator
    return node[len(prefix) :].split(separator)[0] if node.startswith(prefix) else None


def rooms(graph: Graph, separator: str) -> list[str]:
    """Every folder that holds more than one part."""
    inner = {
        node.rsplit(separator, depth)[0] for node in graph for depth in range(1, node.count(separator) + 1)
    }
    return sorted(inner)


def folded(graph: Graph, room: str, separator: str) -> Graph:
    """The arrows between the parts of one room."""
    result: Graph = {}
    for node, targets in graph.items():
        source = child(node, room, separator)
        if source is None:
            continue
        result.setdefault(source, set())
        for other in targets:
            target = child(other, room, separator)
            if target is not None and target != source:
                result[source].add(target)
    return result


def against(parts: Graph, order: Sequence[set[str]]) -> list[str]:
    """Arrows of `parts` that do not point to an earlier level of `order`, and names in one but not the other.

    `*` in a level stands for every part that no level names.
    """
    level = {name: i for i, names in enumerate(order) for name in names}
    wrong = [f"{n} is in the order, but not in the room" for n in level if n not in parts and n != "*"]
    for part in parts:
        if part not in level and "*" not in level:
            wrong.append(f"{part} is in no level of the order")
    place = {part: level.get(part, level.get("*", 0)) for part in parts}
    for part, targets in parts.items():
        wrong += [f"{part} imports {t}" for t in sorted(targets) if place[t] >= place[part]]
    return sorted(wrong)
