"""The Ray cluster of a job: the caller's connection, a running cluster, or one started for the job."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from typing import Any

from paceline.errors import ConfigError
from paceline.launchers.job import JobSpec, Resources
from paceline.launchers.processes.console import Console
from paceline.user_input import digits

_OBJECT_STORE_BYTES = 128 << 20  # of a cluster of our own: only output lines and results go through it
_PROBE_S = 10.0


@contextlib.contextmanager
def connected(job: JobSpec, console: Console) -> Iterator[None]:
    """Inside, `ray` is connected: by the caller, to a running cluster, or to a new one for this job."""
    import ray

    if ray.is_initialized():
        if job.ship is not None:
            raise ConfigError(
                "engine ray: Ray sends code to its hosts (--ship) only when it connects; call launch before"
                " ray.init, or give ray.init a runtime_env with working_dir"
            )
        yield
        return
    address = job.engine_options.get("address") or os.environ.get("RAY_ADDRESS") or "auto"
    settings: dict[str, Any] = {"log_to_driver": False, "logging_level": "ERROR"}
    if job.ship is not None:
        settings["runtime_env"] = {"working_dir": str(job.ship.resolve())}
    folder = None
    try:
        try:
            if address == "local":
                raise ConnectionError
            if address != "auto":
                _probe(address)
            ray.init(address=address, **settings)
        except ConnectionError as error:
            if address not in ("local", "auto"):
                raise ConfigError(f"engine ray: no Ray cluster answers at {address}: {error}") from None
            folder = tempfile.mkdtemp(prefix="paceline-ray-")
            ray.init(address="local", **settings, **_own_cluster(job, folder))
            console.note("started a Ray cluster on this host, for this job only")
        yield
    finally:
        ray.shutdown()
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)


def _probe(address: str) -> None:
    """Raise ConnectionError at once where Ray itself would wait for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or digits(port) is None:
        raise ConfigError(
            f"engine ray: option address={address}: HOST:PORT, ray://HOST:PORT, auto or local expected"
        )
    try:
        socket.create_connection((host.strip("[]"), int(port)), timeout=_PROBE_S).close()
    except (OSError, OverflowError) as error:
        raise ConnectionError(str(error)) from None


def _own_cluster(job: JobSpec, folder: str) -> dict[str, Any]:
    """Arguments of `ray.init` for a new cluster on this host with room for the job."""
    needs = job.resources or Resources()
    cpus = int(needs.cpus * job.total_workers + 0.999)
    return {
        "num_cpus": max(len(os.sched_getaffinity(0)), cpus),
        "include_dashboard": False,
        "object_store_memory": _OBJECT_STORE_BYTES,
        "_temp_dir": folder,
    }
