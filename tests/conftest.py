from __future__ import annotations

import pytest

# Clusters as fixtures, shared by the tests of launchers and of other projects' interfaces.
pytest_plugins = ["clusters"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--fabric",
        choices=("native", "torch"),
        default="native",
        help="what carries the tensors of tests that run on either fabric",
    )


@pytest.fixture(scope="session")
def fabric(request: pytest.FixtureRequest) -> str:
    return str(request.config.getoption("--fabric"))
