"""Makes the name "paceline" known to torch.distributed.

`import torch` calls `register` (an entry point), so this module imports next to nothing.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from paceline.comm.process_group.names import BACKEND

if TYPE_CHECKING:
    from torch._C._distributed_c10d import Store, _DistributedBackendOptions
    from torch.distributed import ProcessGroup


def register() -> None:
    """Make `init_process_group("paceline")` known, and the job's store under `paceline run`; idempotent."""
    # By name: while torch itself is being imported, it has no attribute `distributed` yet.
    distributed: Any = sys.modules.get("torch.distributed") or importlib.import_module("torch.distributed")
    if not distributed.is_available() or BACKEND in distributed.Backend.backend_list:
        return
    distributed.Backend.register_backend(BACKEND, _create, extended_api=True, devices=["cpu"])
    _refuse_torchcomms()
    if "PACELINE_JOB" in os.environ:
        _use_store_of_the_job()


def _refuse_torchcomms() -> None:
    """Where torch sends every backend through torchcomms, say so: that library does not know this one."""
    if os.environ.get("TORCH_DISTRIBUTED_USE_TORCHCOMMS", "0") != "1":
        return
    c10d: Any = importlib.import_module("torch.distributed.distributed_c10d")
    make = getattr(c10d, "new_comm", None)
    if make is None or hasattr(c10d, "_torchcomms_handles_backend"):  # from 2.14 on, only its own backends
        return

    def new_comm(backend: str, *arguments: Any, **named: Any) -> Any:
        if backend == BACKEND:
            from paceline.errors import ConfigError

            raise ConfigError(
                "TORCH_DISTRIBUTED_USE_TORCHCOMMS=1: torch 2.11 to 2.13 then send every backend through"
                f" torchcomms, which does not know {BACKEND}. Unset the variable, or use torch 2.14"
            )
        return make(backend, *arguments, **named)

    c10d.new_comm = new_comm


def _use_store_of_the_job() -> None:
    """Let `init_process_group()` of a worker meet in the launcher's store instead of making one of torch's.

    torch's own would listen on all interfaces and believe all that connect. torch refuses to register a
    second handler for a scheme, so the entry is replaced in its table.
    """
    from paceline.options import JobOptions

    if not JobOptions.from_environment(os.environ).store:
        return
    rendezvous: Any = importlib.import_module("torch.distributed.rendezvous")
    if "env" in rendezvous._rendezvous_handlers:  # noqa: SLF001
        rendezvous._rendezvous_handlers["env"] = _meet_in_store_of_the_job  # noqa: SLF001


def _meet_in_store_of_the_job(
    url: str,  # env://, with the values of rank and world_size where the caller gave them
    timeout: timedelta = timedelta(minutes=30),
    **_: Any,  # torch's options for its own store
) -> Iterator[tuple[Store, int, int]]:
    """torch's rendezvous handler for `env://`: yields the store, the rank and the number of ranks."""
    from urllib.parse import parse_qs, urlparse

    from paceline.comm.rendezvous.environment import who_am_i
    from paceline.comm.rendezvous.job_store import Prefixed
    from paceline.comm.rendezvous.stores import open_launchers_store

    given = parse_qs(urlparse(url).query)
    place = who_am_i(os.environ)
    store = open_launchers_store(os.environ, timeout)
    # A job that a worker starts by itself inherits the store, but has another address.
    name = f"torch/{place.master_address}:{place.master_port}"
    rank, size = int(given.get("rank", [place.rank])[0]), int(given.get("world_size", [place.size])[0])
    yield Prefixed(name, store), rank, size
    raise RuntimeError("env:// cannot meet again")


def _create(options: _DistributedBackendOptions, backend_options: object) -> ProcessGroup:
    """Called by torch.distributed on every rank of a new group."""
    from paceline import core

    if core.missing:
        from paceline.errors import ConfigError

        raise ConfigError(
            f"the backend {BACKEND!r} cannot work here: {core.missing}. Or use the backend 'gloo'"
        )
    from paceline.comm.process_group.connect import create

    return create(options, backend_options)
