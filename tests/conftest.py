from __future__ import annotations

import sys
from collections.abc import Iterator

import pytest

from paceline import plugins, registry

# Clusters as fixtures, shared by the tests of launchers and of other projects' interfaces.
pytest_plugins = ["clusters"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fabric",
        choices=("native", "torch"),
        default="native",
        help="what carries the tensors of tests that run on either fabric",
    )


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
