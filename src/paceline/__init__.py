"""Train one PyTorch model on many workers, by any data-parallel method, over whatever network there is."""

from __future__ import annotations

import importlib
import sys
from typing import Any

__version__ = "0.2.0"

# Lazy (PEP 562): `import paceline` and `paceline schedule …` must not pay for torch.
_EXPORTS = {
    "init": "paceline.train.joining",
    "Job": "paceline.train.job",
    "ddp_hook": "paceline.train.torch_parallel.ddp_hook",
    "fsdp_comm": "paceline.train.torch_parallel.fsdp_comm",
    "launch": "paceline.launchers.launch",
    "simulate": "paceline.comm.simulated.simulate",
    "Task": "paceline.tasks.task",
    "ReduceOp": "paceline.types",
    "PacelineError": "paceline.errors",
    "ConfigError": "paceline.errors",
    "ScheduleError": "paceline.errors",
    "WorkerFailed": "paceline.errors",
    "CheckpointError": "paceline.errors",
    "CommError": "paceline.errors",
    "PeerLost": "paceline.errors",
    "Timeout": "paceline.errors",
    "Mismatch": "paceline.errors",
    "ProtocolError": "paceline.errors",
}

__all__ = ["__version__", *sorted(_EXPORTS)]  # noqa: PLE0604


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'paceline' has no attribute {name!r}; it offers {', '.join(__all__)}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return __all__


if "torch.distributed" in sys.modules:  # loaded before us, perhaps without its entry points
    importlib.import_module("paceline.comm.process_group.register").register()
