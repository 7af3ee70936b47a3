"""Shares for links of different speeds: against the bound, as a schedule, as a name."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline import collectives
from paceline.comm.native import uneven
from paceline.errors import ConfigError
from paceline.schedule import topologies
from paceline.schedule.simulation.simulate import simulate
from paceline.schedule.verification.verify import verify

RATES = st.lists(st.floats(1e6, 1e9), min_size=3, max_size=9)


def port_s(shares, rates):
    """Seconds per byte of the buffer at the busiest port."""
    return max((1 + (len(rates) - 2) * w) / rate for w, rate in zip(shares, rates, strict=True))


@given(RATES)
def test_no_link_takes_longer_than_with_other_shares(rates):
    name = uneven.best(rates)
    if name is None:
        assert max(rates) < 1.5 * min(rates)
        return
    p = len(rates)
    shares = uneven.parse(name, p)
    assert sum(shares) == pytest.approx(1) and min(shares) >= 0
    best = port_s(shares, rates)
    slack = 1.0 + 0.02 * p  # weights are rounded to hundredths
    assert best <= slack * port_s([1 / p] * p, rates)
    assert best >= 1 / min(rates) * (1 - 1e-9), "nobody can send less than its contribution"
    for r in range(p):  # moving a tenth from one rank to another helps none
        for other in range(p):
            if r != other and shares[r] >= 0.1:
                moved = list(shares)
                moved[r] -= 0.1
                moved[other] += 0.1
                assert best <= slack * port_s(moved, rates)


@pytest.mark.parametrize(("p", "factor"), [(3, 4.0), (4, 4.0), (4, 2.0), (8, 4.0), (8, 1.6)])
def test_beats_every_other_schedule_beside_one_slow_link(p, factor):
    rates = [1e8] * (p - 1) + [1e8 / factor]
    name = uneven.best(rates)
    links = topologies.switched(
        "slow", [f"h{r}" for r in range(p)], nic_latency_s=1e-4, nic_seconds_per_byte=[1 / r for r in rates]
    )
    program = uneven.program(uneven.parse(name, p))
    verify(program)
    ours = simulate(program, links, 16 << 20).time_s
    for other in collectives.names():
        if collectives.supports(other, "all_reduce", p) is True and other != "hierarchical":
            assert ours < simulate(collectives.build(other, "all_reduce", p), links, 16 << 20).time_s, other
    if factor == 4:
        assert ours < 1.1 * (16 << 20) / rates[-1], "the slow link carries the buffer once each way"


@given(st.integers(0, 100_000), st.lists(st.integers(0, 9), min_size=1, max_size=6).filter(any))
def test_counts(numel, weights):
    shares = uneven.parse(uneven.name_of(weights), len(weights))
    counts = uneven.counts(numel, shares)
    assert sum(counts) == numel and min(counts) >= 0
    for count, share in zip(counts, shares, strict=True):
        assert abs(count - numel * share) <= 64 and (share > 0 or count == 0)


@pytest.mark.parametrize("weights", ["1/1", "1/1/1/1", "1/x/1", "1/-1/1", "0/0/0", "inf/1/1", "nan/1/1", ""])
def test_wrong_weights_are_refused(weights):
    with pytest.raises(ConfigError, match="3 weights >= 0"):
        uneven.parse(f"direct(shares={weights})", 3)


def test_equal_links_and_other_names():
    assert uneven.best([1e8, 1.2e8, 1.1e8]) is None
    assert uneven.best([1e8, 1e7]) is None, "two ranks exchange everything anyway"
    assert uneven.parse("ring", 3) is None and uneven.parse("direct", 3) is None
