"""Every fault that the package once had is found by the generator when it is there again."""

from __future__ import annotations

import json

import pytest
from choices import draw
from planted import FAULTS, RECORDED, found_in
from test_loops import difference

FIRST = json.loads(RECORDED.read_text())


def test_every_fault_was_found() -> None:
    """`python tests/equivalence/loops/planted.py --record` looks for the loops again."""
    assert set(FIRST) == set(FAULTS)
    assert max(FIRST.values()) < 500


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name: str) -> None:
    """By the loop that was recorded; after a change of the generator, by another one."""
    seeds = [FIRST[name], *range(500)]
    assert found_in(name, seeds) is not None


@pytest.mark.parametrize("seed", sorted(set(FIRST.values())))
def test_without_a_fault_these_loops_are_right(seed: int) -> None:
    assert not difference(draw(seed))
