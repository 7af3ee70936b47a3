"""CRC-32C: from the core, or from NumPy where there is no core."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from paceline import core

Words = npt.NDArray[np.uint32]
_POLYNOMIAL = 0x82F63B78  # reflected
_LANE_BYTES = 1024
_PART_BYTES = 1 << 26  # bounds the memory


@functools.cache
def _table() -> Words:
    values = np.arange(256, dtype=np.uint32)
    one, polynomial = np.uint32(1), np.uint32(_POLYNOMIAL)
    for _ in range(8):
        values = values >> one ^ (values & one) * polynomial
    return values


def _step(states: Words, data: npt.NDArray[np.uint8] | int) -> Words:
    """Take one byte into each state."""
    found: Words = _table()[(states ^ data) & 255] ^ (states >> np.uint32(8))
    return found


@functools.cache
def _past_a_lane() -> list[list[int]]:
    """For each of the four bytes of a state: what `_LANE_BYTES` zeros make of its 256 values."""
    states = np.concatenate([np.arange(256, dtype=np.uint32) << np.uint32(8 * k) for k in range(4)])
    for _ in range(_LANE_BYTES):
        states = _step(states, 0)
    return [part.tolist() for part in states.reshape(4, 256)]


def _continued(state: int, data: npt.NDArray[np.uint8]) -> int:
    """The state after `data`: lanes side by side from zero, then joined, as a CRC is linear."""
    num_lanes = len(data) // _LANE_BYTES
    if num_lanes:
        columns = np.ascontiguousarray(data[: num_lanes * _LANE_BYTES].reshape(num_lanes, -1).T)
        states = np.zeros(num_lanes, dtype=np.uint32)
        for column in columns:
            states = _step(states, column)
        first, second, third, fourth = _past_a_lane()
        for lane in states.tolist():
            state = (
                first[state & 255]
                ^ second[state >> 8 & 255]
                ^ third[state >> 16 & 255]
                ^ fourth[state >> 24]
                ^ lane
            )
    table = _table().tolist()
    for byte in data[num_lanes * _LANE_BYTES :].tolist():
        state = table[(state ^ byte) & 255] ^ state >> 8
    return state


def reference_crc32c(data: Any, crc: int = 0) -> int:
    """CRC-32C of a bytes-like object, continuing from `crc`, without the core."""
    view = np.frombuffer(data, dtype=np.uint8)
    state = ~crc & 0xFFFFFFFF
    for start in range(0, len(view), _PART_BYTES):
        state = _continued(state, view[start : start + _PART_BYTES])
    return ~state & 0xFFFFFFFF


crc32c: Callable[..., int] = core.module.crc32c if core.module is not None else reference_crc32c
