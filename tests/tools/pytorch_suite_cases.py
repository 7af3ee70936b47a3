"""PyTorch's own distributed test class, which reads its backend from BACKEND when it is imported.

Many of its tests ask `BACKEND == "gloo"` to mean "a CPU backend that can do everything": for those questions
our name answers yes, so the tests are not skipped.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import sys

os.environ.setdefault("BACKEND", "paceline")
os.environ.setdefault("WORLD_SIZE", "3")
os.environ.setdefault("TEMP_DIR", "/tmp")

NAME = "torch.testing._internal.distributed.distributed_test"


class LikeGloo(str):
    """A backend's name that also answers to "gloo"."""

    __slots__ = ()

    def __eq__(self, other: object) -> bool:
        return str.__eq__(self, other) or other == "gloo"

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __hash__(self) -> int:
        return hash("gloo")


def load():
    """The test module with `BACKEND` answering as above (unchanged for gloo itself)."""
    if NAME in sys.modules:
        return sys.modules[NAME]
    spec = importlib.util.find_spec(NAME)
    with open(spec.origin) as file:
        text = file.read()
    line = 'BACKEND = os.environ["BACKEND"]'
    assert text.count(line) == 1, f"{spec.origin} has changed"
    text = text.replace(line, f"{line}; BACKEND = BACKEND if BACKEND == 'gloo' else LikeGloo(BACKEND)")
    module = importlib.util.module_from_spec(spec)
    module.LikeGloo = LikeGloo
    sys.modules[NAME] = module
    from torch.testing._internal.common_distributed import DistTestCases

    DistTestCases.backend_feature["plugin"].add("paceline")  # before decorators ask
    exec(compile(text, spec.origin, "exec", dont_inherit=True), module.__dict__)
    return module


suite = load()
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["pytorch_suite_cases"])


def in_environment(environment, target, arguments, named) -> None:
    """Run `target` with the parent's environment: a forked server's is as old as the server."""
    os.environ.update(environment)
    target(*arguments, **named)


def start(target, name, args, kwargs):
    """A process of the server; same arguments as multiprocessing.Process."""
    return CONTEXT.Process(target=in_environment, name=name, args=(dict(os.environ), target, args, kwargs))


class PyTorchDistributedTest(suite.TestDistBackend, suite.DistributedTest._DistTestBase):
    """The tests, in processes that are forked from one that has torch loaded already."""

    def setUp(self) -> None:
        super().setUp()
        self._start_processes(start)
