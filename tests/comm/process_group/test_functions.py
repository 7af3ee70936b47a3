"""Every function of torch.distributed over shared memory and over TCP, two ranks and four."""

from __future__ import annotations

import functools

import c10d_checks
import c10d_group_checks
import pytest
from c10d_ranks import checks, outcome

pytestmark = [pytest.mark.distributed, pytest.mark.xdist_group("processes"), pytest.mark.timeout(240)]


NAMES = {name: m.__name__ for m in (c10d_checks, c10d_group_checks) for name in checks(m)}


@functools.cache
def failures(module: str, size: int, network: bool) -> dict[str, str]:
    try:
        return outcome(size, module, network=network)
    except AssertionError as error:  # ranks died or hang: every check has failed, once is enough
        return dict.fromkeys(NAMES, str(error))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("size", "network"), [(4, False), (3, True)], ids=["shm", "tcp"])
def test_function(name: str, size: int, network: bool) -> None:
    if name == "check_device_mesh" and size % 2:
        pytest.skip("the mesh needs an even number of ranks")
    assert name not in (failed := failures(NAMES[name], size, network)), failed[name]
