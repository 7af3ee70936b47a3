"""Makes the name "paceline" known to torch.distributed.

`import torch` calls `register` (an entry point), so this module imports next to nothing.
"""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

from paceline.comm.process_group.names import BACKEND

if TYPE_CHECKING:
    from torch._C._distributed_c10d import _DistributedBackendOptions
    from torch.distributed import ProcessGroup


def register() -> None:
    """Make `init_process_group("paceline")` known; idempotent."""
    # By name: while torch itself is being imported, it has no attribute `distributed` yet.
    distributed: Any = sys.modules.get("torch.distributed") or importlib.import_module("torch.distributed")
    if not distributed.is_available() or BACKEND in distributed.Backend.backend_list:
        return
    distributed.Backend.register_backend(BACKEND, _create, extended_api=True, devices=["cpu"])


def _create(options: _DistributedBackendOptions, backend_options: object) -> ProcessGroup:
    """Called by torch.distributed on every rank of a new group."""
    from paceline.comm.process_group.connect import create

    return create(options, backend_options)
