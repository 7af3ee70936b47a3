"""Which of a host's interfaces a list chooses."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from paceline.comm.rendezvous import interfaces

ADDRESSES = {"lo": "127.0.0.1", "eth0": "10.0.0.1", "eth1": "10.0.1.1", "docker0": "172.17.0.1", "ib0": None}


@pytest.fixture(autouse=True)
def host(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "if_nameindex", lambda: list(enumerate(ADDRESSES, start=1)))
    monkeypatch.setattr(interfaces, "address_of", ADDRESSES.get)


@pytest.mark.parametrize(
    ("wanted", "names"),
    [
        ("eth0", ["eth0"]),
        ("eth", ["eth0", "eth1"]),
        ("eth1, eth0", ["eth1", "eth0"]),
        ("=eth1,eth0", ["eth1", "eth0"]),
        ("^docker", ["eth0", "eth1"]),
        ("^docker,lo", ["eth0", "eth1"]),
        ("^=eth0,docker0", ["eth1"]),
        ("127.0.0.1", ["127.0.0.1"]),
        ("eth,eth0", ["eth0", "eth1"]),
    ],
)
def test_what_a_list_chooses(wanted: str, names: list[str]) -> None:
    assert interfaces.chosen(wanted) == names


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ("wlan", "no interface or address 'wlan'; its interfaces: lo, eth0"),
        ("=eth", "no interface or address 'eth'"),
        ("^eth,docker", "leaves no interface"),
        ("^", "leaves no interface"),
        ("ib", "no interface or address 'ib'"),
        ("", "no interface or address ''"),
        ("eth0,", "no interface or address ''"),
        ("203.0.113.9", "no interface or address '203.0.113.9'"),
    ],
)
def test_what_a_host_does_not_have_is_refused(wanted: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        interfaces.chosen(wanted)


TABLE = """\
00000000000000000000000000000001 01 80 10 80       lo
fd770000000000000000000000000001 02 40 00 80     eth0
fe80000000000000c8e2d3fffe9f3b0a 02 40 20 80     eth0
fe80000000000000c8e2d3fffe9f3b0b 03 40 20 80    eth00
"""


@pytest.mark.parametrize(
    ("ipv4", "own", "listens_at"),
    [
        ({}, ["fd77::1", "::1"], "::"),
        ({"lo": "127.0.0.1"}, ["fd77::1", "127.0.0.1", "::1"], "::"),
        ({"eth0": "10.0.0.1"}, ["10.0.0.1", "fd77::1", "::1"], "0.0.0.0"),
    ],
)
def test_addresses_of_both_versions(
    ipv4: dict[str, str], own: list[str], listens_at: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    (tmp_path / "if_inet6").write_text(TABLE)
    monkeypatch.setattr(socket, "if_nameindex", lambda: [(1, "lo"), (2, "eth0"), (3, "eth00")])
    monkeypatch.setattr(interfaces, "_IPV6_ADDRESSES", tmp_path / "if_inet6")
    monkeypatch.setattr(interfaces, "_ipv4_address_of", ipv4.get)
    assert interfaces.own_addresses() == own
    assert interfaces.address_of("eth0") == ipv4.get("eth0", "fd77::1")
    assert interfaces.address_of("eth00") is None
    assert interfaces.interface_of("fd77:0::1") == "eth0"
    assert interfaces.interface_of("fd77::2") is None
    assert interfaces.listening_address("no-such-name.invalid") == listens_at
