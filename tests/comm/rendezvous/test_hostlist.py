"""Slurm's host lists, as Slurm itself expands them."""

from __future__ import annotations

import pytest

from paceline.comm.rendezvous.hostlist import expand, expand_counts
from paceline.errors import ConfigError


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("alpha", ["alpha"]),
        ("a,b", ["a", "b"]),
        ("node[1-3]", ["node1", "node2", "node3"]),
        ("node[07-10]", ["node07", "node08", "node09", "node10"]),
        ("n[098-101]", ["n098", "n099", "n100", "n101"]),
        ("n[9-11,3]-ib0", ["n9-ib0", "n10-ib0", "n11-ib0", "n3-ib0"]),
        ("r[1-2]n[01-02]", ["r1n01", "r1n02", "r2n01", "r2n02"]),
        ("a[1-2],b,c[5,7]", ["a1", "a2", "b", "c5", "c7"]),
        ("rack[0-1]node[8-9,11].site", [f"rack{r}node{n}.site" for r in (0, 1) for n in (8, 9, 11)]),
        ("127.0.0.[1-2]", ["127.0.0.1", "127.0.0.2"]),
        (" a , b ", ["a", "b"]),
        ("", []),
    ],
)
def test_expansion(text: str, hosts: list[str]) -> None:
    assert expand(text) == hosts


@pytest.mark.parametrize("text", ["a[1-2", "a1-2]", "a[2-1]", "a[x]", "a[]", "a[1-[2]]", "a[0-99999999]"])
def test_what_is_no_host_list(text: str) -> None:
    with pytest.raises(ConfigError, match="host list"):
        expand(text)


def test_a_product_of_ranges_is_bounded() -> None:
    with pytest.raises(ConfigError, match="at most 65536"):
        expand("a[0-999]b[0-999]c[0-999]")


def test_counts() -> None:
    assert expand_counts("2(x3),1") == [2, 2, 2, 1]
    assert expand_counts("4") == [4]
    with pytest.raises(ConfigError, match="tasks per node"):
        expand_counts("2x3")
