from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from paceline import core, plugins, registry

# Clusters as fixtures, shared by the tests of launchers and of other projects' interfaces.
pytest_plugins = ["clusters"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fabric",
        choices=("native", "torch"),
        default="torch" if core.missing else "native",
        help="what carries the tensors of tests that run on either fabric",
    )


NEEDS_CORE = re.compile(r"import _core|paceline\._core|paceline\.comm\.native|comm\.process_group")


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """An installation without the core runs what does not need it."""
    if not core.missing:
        return None
    if collection_path.is_dir():
        return collection_path.name in ("core", "native", "process_group") or None
    return bool(NEEDS_CORE.search(collection_path.read_text())) or None


def pytest_report_header() -> str | None:
    """Say what is left out."""
    return f"tests that import the core are left out: {core.missing}" if core.missing else None


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Iterator[None]:
    """Plug-ins that a test loads are not there for the next test of this process."""
    loaded, added, path = dict(plugins._loaded), {k: dict(v) for k, v in registry._added.items()}, [*sys.path]
    result = yield
    if plugins._loaded != loaded:
        plugins._loaded, registry._added, sys.path[:] = loaded, added, path
        from paceline import collectives

        collectives._known.cache_clear()
    return result


@pytest.fixture(scope="session")
def fabric(request: pytest.FixtureRequest) -> str:
    return str(request.config.getoption("--fabric"))
