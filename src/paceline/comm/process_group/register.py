"""The name "paceline" for torch.distributed; cheap, because `import torch` calls it (an entry point)."""

from __future__ import annotations

import importlib
import sys
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

BACKEND = "paceline"


def register() -> None:
    """Make `init_process_group("paceline")` known; idempotent."""
    distributed: Any = sys.modules.get("torch.distributed") or importlib.import_module("torch.distributed")
    if not distributed.is_available() or BACKEND in distributed.Backend.backend_list:
        return
    distributed.Backend.register_backend(BACKEND, _create, extended_api=True, devices=["cpu"])


def _create(options: Any, backend_options: Any) -> ProcessGroup:
    """Called by torch.distributed on every rank of a new group."""
    from paceline.comm.process_group.connect import create

    return create(options, backend_options)
