"""Two words to the process manager of MPICH and Intel MPI (Hydra), in its own line protocol, PMI version 1.

Hydra ends the other ranks when one fails only if that one says so; MPI_Abort would, and a script without MPI
has nobody to say it. Source: Balaji et al., PMI: a scalable parallel process-management interface, 2010.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Mapping
from types import TracebackType

_installed = False


def abort_on_exception(environment: Mapping[str, str]) -> None:
    """After an exception that nobody catches, ask Hydra to end the whole job with exit code 1."""
    global _installed  # noqa: PLW0603
    descriptor = _descriptor(environment)
    if descriptor is None or _installed:
        return
    _installed = True
    before = sys.excepthook

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        before(kind, error, trace)
        sys.stderr.flush()
        try:
            os.write(descriptor, b"cmd=abort exitcode=1\n")
        except OSError:
            pass  # the process manager has gone: so will we

    sys.excepthook = hook


def _descriptor(environment: Mapping[str, str]) -> int | None:
    """The open socket to the process manager, if this process has one."""
    text = environment.get("PMI_FD", "")
    if not text.isdigit():
        return None
    try:
        is_socket = stat.S_ISSOCK(os.fstat(int(text)).st_mode)
    except OSError:
        return None
    return int(text) if is_socket else None
