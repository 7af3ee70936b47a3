from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from paceline import _core


def test_crc32c_known_values() -> None:
    # RFC 3720, appendix B.4
    assert _core.crc32c(b"\x00" * 32) == 0x8A9136AA
    assert _core.crc32c(b"\xff" * 32) == 0x62A8AB43
    assert _core.crc32c(bytes(range(32))) == 0x46DD794E
    assert _core.crc32c(b"123456789") == 0xE3069283


@given(st.binary(max_size=300), st.integers(0, 300))
def test_crc32c_can_be_continued(data: bytes, cut: int) -> None:
    assert _core.crc32c(data[cut:], _core.crc32c(data[:cut])) == _core.crc32c(data)
