from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from paceline import _core
from paceline.comm import reference
from paceline.comm.native.codes import DTYPE_CODES, OP_CODES
from paceline.schedule.interpret import divide
from paceline.types import ReduceOp


def test_crc32c_known_values() -> None:
    # RFC 3720, appendix B.4
    assert _core.crc32c(b"\x00" * 32) == 0x8A9136AA
    assert _core.crc32c(b"\xff" * 32) == 0x62A8AB43
    assert _core.crc32c(bytes(range(32))) == 0x46DD794E
    assert _core.crc32c(b"123456789") == 0xE3069283


@given(st.binary(max_size=300), st.integers(0, 300))
def test_crc32c_can_be_continued(data: bytes, cut: int) -> None:
    assert _core.crc32c(data[cut:], _core.crc32c(data[:cut])) == _core.crc32c(data)


@pytest.mark.parametrize("num_ranks", [1, 3, 4, 127, 128, 200, 256, 1000])
@pytest.mark.parametrize(
    "dtype", ["int8", "uint8", "int16", "uint16", "int32", "int64", "complex64", "complex128"]
)
def test_means_of_many_ranks(dtype: str, num_ranks: int) -> None:
    """The core, the interpreter and the other fabrics divide alike, also where P does not fit the dtype."""
    kind = getattr(torch, dtype)
    if kind.is_complex:
        total = (np.linspace(-1, 1, 99) - 1j * np.linspace(3, 5, 99) ** 3).astype(dtype)
    else:
        low, high = np.iinfo(dtype).min, np.iinfo(dtype).max
        total = np.array([low, low + 1, high // 3, high - 1, high], dtype=dtype)
        quotients = [abs(int(v)) // num_ranks * (-1 if v < 0 else 1) for v in total]
        assert divide(total, num_ranks).tolist() == quotients
    out = np.empty_like(total)
    codes = DTYPE_CODES[kind], OP_CODES[ReduceOp.MEAN]
    _core.reduce(*codes, [out.ctypes.data], [total.ctypes.data], total.size, num_ranks)
    assert out.tobytes() == divide(total, num_ranks).tobytes()
    elsewhere = reference.divided(torch.from_numpy(total.copy()), num_ranks).to(kind)
    assert elsewhere.numpy().tobytes() == out.tobytes()
