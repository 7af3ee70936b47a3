"""Which of a host's interfaces a list chooses."""

from __future__ import annotations

import socket

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
