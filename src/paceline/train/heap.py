"""Memory that a step frees stays with the process for the next step.

glibc gives large freed blocks back to the kernel, and a training step frees all its gradients and
activations: the next one gets every page of them again, zeroed, by page faults. For a model of 25 million
parameters that is up to a quarter of a step on a CPU.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3  # mallopt's numbers of M_TRIM_THRESHOLD and M_MMAP_THRESHOLD
_KEPT_BYTES = 2**31 - 1  # the most that mallopt takes
_OWN_MAPPING_BYTES = 1 << 30


def keep_freed_memory(environment: Mapping[str, str]) -> bool:
    """Let malloc keep up to 2 GiB at the end of its heap, and take blocks below 1 GiB from the heap.

    Returns whether that was done: not where `environment` already says how malloc should behave
    (MALLOC_TRIM_THRESHOLD_, MALLOC_MMAP_THRESHOLD_, GLIBC_TUNABLES with glibc.malloc), nor without glibc.
    Allocators that replace malloc do not listen to it.
    """
    if any(name in environment for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_")):
        return False
    if "glibc.malloc" in environment.get("GLIBC_TUNABLES", ""):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None:
        return False
    return bool(mallopt(_MMAP_THRESHOLD, _OWN_MAPPING_BYTES) and mallopt(_TRIM_THRESHOLD, _KEPT_BYTES))
