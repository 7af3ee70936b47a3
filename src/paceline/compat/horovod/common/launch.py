"""`horovod.run`: a function on several processes of this host, from Python."""

from __future__ import annotations

import importlib.util
import socket
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from paceline.compat.horovod.common.environment import publish
from paceline.errors import ConfigError
from paceline.launchers.launch import launch
from paceline.user_input import digits

# What chooses between Horovod's own ways of starting and talking, or concerns other hosts.
_WITHOUT_EFFECT = {
    *("use_gloo", "use_mpi", "verbose", "start_timeout", "disable_cache"),
    *("ssh_port", "ssh_identity_file", "network_interface", "network_interfaces"),
}
_SEVERAL_HOSTS = "for several hosts, use `paceline run --nodes N` on each"
_ELASTIC = "for an elastic job, use `paceline run --max-restarts N`"
_REFUSED = {
    "hostfile": f"this host only; {_SEVERAL_HOSTS}",
    "host_discovery_script": _ELASTIC,
    "cooldown_range": _ELASTIC,
    "mpi_args": "to start workers with MPI, use `paceline run --on mpi`",
    "output_filename": "redirect the output of this script: its lines begin with their rank",
    "executable": "workers run the Python of this script; start the script with that one",
}


def run(
    func: Callable[..., Any],
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    num_proc: int = 1,
    min_num_proc: int | None = None,
    max_num_proc: int | None = None,
    slots: int | None = None,
    reset_limit: int | None = None,
    *,
    np: int | None = None,
    min_np: int | None = None,
    max_np: int | None = None,
    hosts: str | None = None,
    **options: object,
) -> list[Any]:
    """Call `func(*args, **kwargs)` in new processes of this host; return their results in rank order.

    Args:
        func: A function at the top level of a module or of the script; workers import it by name.
        args: Its arguments; they and the results are pickled.
        kwargs: Its keyword arguments; default none.
        num_proc: Number of processes; default 1.
        min_num_proc: Accepted if it is `num_proc`: a job of this call does not shrink.
        max_num_proc: Accepted if it is `num_proc`.
        slots: Processes that a host has room for, `num_proc` at least; default `num_proc`.
        reset_limit: How many times all processes are restarted after a failure; default never.
        np: The older name of `num_proc`.
        min_np: The older name of `min_num_proc`.
        max_np: The older name of `max_num_proc`.
        hosts: This host with or without its slots, as in `localhost:4`; default this host.
        options: Horovod's other options: what chooses its transport, its logging or the way to other hosts
            means nothing here; the rest is refused by name.

    Raises:
        ConfigError: Other hosts, another number of processes, or an option that has no counterpart.
        WorkerFailed: A process raised; the message has its traceback.
    """
    count = num_proc if np is None else np
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ConfigError(f"horovod.run(num_proc={count!r}): a number of processes of at least 1 expected")
    _check_options({name: value for name, value in options.items() if value is not None})
    _check_room(count, hosts, slots)
    if {min_num_proc, max_num_proc, min_np, max_np} - {None, count}:
        least, most = min_np or min_num_proc, max_np or max_num_proc
        raise ConfigError(
            f"horovod.run: {count} processes asked for with min_num_proc={least} and max_num_proc={most}; "
            f"give num_proc alone; {_ELASTIC}"
        )
    return launch(
        _call, num_workers=count, args=(func, tuple(args), dict(kwargs or {})), max_restarts=reset_limit
    )


def _check_options(given: Mapping[str, object]) -> None:
    """Refuse what has no counterpart, each option with what to use in its place."""
    if given.get("executable") == sys.executable:
        given = {name: value for name, value in given.items() if name != "executable"}
    if given.get("use_gloo") and given.get("use_mpi"):
        raise ConfigError("horovod.run: use_gloo and use_mpi exclude each other; neither is needed here")
    reasons = [
        f"{name} ({_REFUSED.get(name, 'no such option; leave it out')})"
        for name in sorted(set(given) - _WITHOUT_EFFECT)
    ]
    if reasons:
        raise ConfigError(f"horovod.run: no counterpart for {'; '.join(reasons)}")


def _check_room(count: int, hosts: str | None, slots: int | None) -> None:
    """Refuse other hosts, and fewer slots than processes."""
    room = slots
    if hosts is not None:
        name, _, number = hosts.partition(":")
        if "," in hosts or name not in ("localhost", "127.0.0.1", socket.gethostname()):
            raise ConfigError(f"horovod.run(hosts={hosts!r}): this host only; {_SEVERAL_HOSTS}")
        if number and (room := digits(number)) is None:
            raise ConfigError(f"horovod.run(hosts={hosts!r}): a number of slots expected, got {number!r}")
    if room is not None and room < count:
        raise ConfigError(
            f"horovod.run: {count} processes do not fit into {room} slots; give as many slots as num_proc"
        )


def _call(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> object:
    """Call `func` in a worker, where `import horovod.torch` means this interface."""
    publish(again=True)
    if importlib.util.find_spec("horovod") is None:
        sys.path.append(str(Path(__file__).resolve().parents[1] / "stand_in"))
    return func(*args, **kwargs)
