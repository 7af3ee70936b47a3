"""CRC-32C without the core: the same numbers."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline import _core, checksum
from paceline.checksum import reference_crc32c


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (b"", 0),
        (b"123456789", 0xE3069283),  # the check value of the CRC catalogue
        (bytes(32), 0x8A9136AA),  # and three of RFC 3720, B.4
        (b"\xff" * 32, 0x62A8AB43),
        (bytes(range(32)), 0x46DD794E),
    ],
)
def test_published_values(data: bytes, expected: int) -> None:
    assert reference_crc32c(data) == expected == checksum.crc32c(data)


@given(st.binary(max_size=5000), st.binary(max_size=5000))
def test_equals_the_core_and_continues(first: bytes, second: bytes) -> None:
    whole = _core.crc32c(first + second)
    assert reference_crc32c(first + second) == whole
    assert reference_crc32c(second, reference_crc32c(first)) == whole


def test_parts_join(monkeypatch: pytest.MonkeyPatch) -> None:
    data = random.Random(0).randbytes(100_001)
    expected = _core.crc32c(data)
    for size in (1, 1023, 1024, 40_000):
        monkeypatch.setattr(checksum, "_PART_BYTES", size)
        assert reference_crc32c(data) == expected
        assert reference_crc32c(memoryview(bytearray(data))) == expected
