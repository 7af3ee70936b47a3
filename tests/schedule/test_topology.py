"""Topologies: routes, costs, sharing, specs, JSON."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from one_message import message_s

from paceline.errors import ConfigError
from paceline.schedule import topologies
from paceline.schedule.topology import NONE

SPECS = [
    "ethernet(gbit=1)",
    "cluster(local=4, rails=2)",
    "dumbbell(trunk_gbit=5)",
    "shared_memory",
    "ring",
    "torus",
    "hypercube",
    "fully_connected",
    "dgx1",
    "random(seed=3)",
]


@pytest.mark.parametrize("text", SPECS)
def test_paths_lead_from_source_to_destination(text: str) -> None:
    net = topologies.parse(text, num_ranks=8)
    src, dst = (a.ravel() for a in np.indices((8, 8)))
    start, end = net.ends()
    for a, b, path in zip(src, dst, net.path(src, dst), strict=True):
        at = {int(a)}
        hops = [int(link) for link in path if link != NONE]
        assert (a == b) == (not hops)
        if isinstance(net, topologies.Switched):
            continue  # ports are named by use, not in the order of travel; see the tests below
        for link in hops:
            assert int(start[link]) in at
            at = {int(end[link])}
        assert int(b) in at or a == b


@pytest.mark.parametrize("text", SPECS)
def test_json_round_trip(text: str) -> None:
    net = topologies.parse(text, num_ranks=8)
    again = topologies.from_json(json.loads(json.dumps(net.to_json())))
    src, dst = (a.ravel() for a in np.indices((8, 8)))
    assert type(again) is type(net)
    assert again.hosts == net.hosts
    assert np.array_equal(again.path(src, dst, 1), net.path(src, dst, 1))
    assert again.to_json() == net.to_json()
    assert message_s(again, 0, 5, 1000) == message_s(net, 0, 5, 1000)


def test_ethernet_message_is_latency_plus_bytes() -> None:
    net = topologies.parse("ethernet(gbit=1, latency_us=50)", num_ranks=4)
    assert message_s(net, 0, 3, 1_000_000) == pytest.approx(50e-6 + 8e-3)
    assert message_s(net, 2, 2, 1_000_000) == 0
    assert net.uniform() == pytest.approx((50e-6, 8e-9))


def test_ranks_of_one_host_share_its_nic_but_not_their_memory() -> None:
    net = topologies.parse("cluster(hosts=2, local=3)")
    out = net.path(np.array([0, 1, 2]), np.array([3, 4, 5]))
    assert len(set(out[:, 0])) == 1
    assert len(set(out[:, 1])) == 1
    inside = net.path(np.array([0, 1]), np.array([1, 2]))
    assert len(set(inside.ravel())) == 4
    assert message_s(net, 0, 1, 1e6) < message_s(net, 0, 3, 1e6)
    assert net.uniform() is None


def test_rails_separate_local_ranks_and_channels() -> None:
    net = topologies.parse("cluster(hosts=2, local=2, rails=2)")
    out = net.path(np.array([0, 1]), np.array([2, 3]))[:, 0]
    assert out[0] != out[1]
    channels = net.path(np.array([0, 0]), np.array([2, 2]), np.array([0, 1]))[:, 0]
    assert channels[0] != channels[1]


def test_dumbbell_shares_the_trunk_across_and_not_within() -> None:
    net = topologies.parse("dumbbell(ranks=4, gbit=10, trunk_gbit=1)")
    across = net.path(np.array([0, 1]), np.array([2, 3]))
    assert len(set(across[:, 2])) == 1
    assert message_s(net, 0, 2, 1e6) == pytest.approx(100e-6 + 8e-3)
    assert message_s(net, 0, 1, 1e6) == pytest.approx(50e-6 + 8e-4)


def test_torus_goes_the_short_way_round() -> None:
    net = topologies.parse("torus(rows=4, columns=5)")
    assert (net.path(np.array([0]), np.array([19])) != NONE).sum() == 2  # up one row, back one column
    assert (net.path(np.array([0]), np.array([12])) != NONE).sum() == 4


def test_hypercube_distance_is_the_number_of_differing_bits() -> None:
    net = topologies.parse("hypercube(ranks=16)")
    src, dst = (a.ravel() for a in np.indices((16, 16)))
    hops = (net.path(src, dst) != NONE).sum(axis=1)
    assert hops.tolist() == [int(a ^ b).bit_count() for a, b in zip(src, dst, strict=True)]


def test_dgx1_has_six_links_per_gpu() -> None:
    net = topologies.parse("dgx1")
    src, _ = net.ends()
    unit = net.link_seconds_per_byte.max()
    lanes = np.bincount(src, weights=unit / net.link_seconds_per_byte)
    assert lanes.tolist() == [6.0] * 8
    assert (net.path(np.array([0]), np.array([7])) != NONE).sum() == 2


def test_random_is_a_function_of_its_seed() -> None:
    a, b, c = (topologies.parse(f"random(seed={s})", num_ranks=6) for s in (1, 1, 2))
    assert np.array_equal(a.link_seconds_per_byte, b.link_seconds_per_byte)
    assert not np.array_equal(a.link_seconds_per_byte, c.link_seconds_per_byte)


def test_sixteen_thousand_ranks_are_cheap_to_describe() -> None:
    net = topologies.parse("ethernet", num_ranks=16384)
    ranks = np.arange(16384)
    assert net.path(ranks, (ranks + 1) % 16384).shape == (16384, 2)
    assert len(json.dumps(net.to_json()["link_latency_s"])) < 200


@pytest.mark.parametrize(
    ("text", "ranks", "says"),
    [
        ("etherner", 4, "ethernet"),
        ("ethernet(gbits=1)", 4, "gbit"),
        ("ethernet(gbit=0)", 4, "gbit"),
        ("ethernet(gbit=fast)", 4, "gbit"),
        ("cluster(hosts=4, local=2)", 9, "8 ranks, but 9"),
        ("cluster(local=4)", 6, "do not fill"),
        ("hypercube", 6, "power of two"),
        ("dgx1", 4, "8 ranks, but 4"),
        ("torus(rows=3)", 8, "6 ranks, but 8"),
        ("torus(rows=0)", 8, "rows"),
        ("fully_connected", 5000, "at most"),
        ("ethernet(latency_us=-1)", 4, "not negative"),
        ("random(spread=0)", 4, "spread"),
        ("/nowhere.json", 4, "nowhere"),
    ],
)
def test_bad_specs_are_refused_clearly(text: str, ranks: int, says: str) -> None:
    with pytest.raises(ConfigError, match=says):
        topologies.parse(text, num_ranks=ranks)


@pytest.mark.parametrize("value", [{}, {"paceline_topology": 1, "kind": "moon"}, {"paceline_topology": 2}])
def test_json_that_is_no_topology_is_refused(value: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match="topology JSON"):
        topologies.from_json(value)


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(1, 6), columns=st.integers(1, 6))
def test_torus_hops_are_the_manhattan_distance(rows: int, columns: int) -> None:
    net = topologies.parse(f"torus(rows={rows}, columns={columns})")
    p = rows * columns
    src, dst = (a.ravel() for a in np.indices((p, p)))

    def away(a: np.ndarray, b: np.ndarray, side: int) -> np.ndarray:
        return np.minimum((a - b) % side, (b - a) % side)

    want = away(src // columns, dst // columns, rows) + away(src % columns, dst % columns, columns)
    assert np.array_equal((net.path(src, dst) != NONE).sum(axis=1), want)
