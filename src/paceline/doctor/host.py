"""Checks of this host alone."""

from __future__ import annotations

import ipaddress
import os
import platform
import resource
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import paceline
from paceline.doctor.finding import NOTE, OK, PROBLEM, WARNING, Finding

_FEW_FILES, _TOO_FEW_FILES = 1024, 128
_LITTLE_SHM_BYTES = 512 << 20
_PEEK = "import os, sys; os.open(f'/proc/{sys.argv[1]}/fd/{sys.argv[2]}', os.O_RDWR)"


def examine(*, local_ranks: int = 1, environment: Mapping[str, str] = os.environ) -> list[Finding]:
    """All findings about this host, on which `local_ranks` ranks are to run."""
    checks: list[Callable[[], Finding]] = [
        _versions,
        _core,
        _shared_segments,
        _shared_memory,
        _files,
        _name,
        lambda: _cores(local_ranks, environment),
    ]
    found = []
    for check in checks:
        try:
            found.append(check())
        except OSError as error:  # a check that fails must not hide the others
            found.append(Finding(check.__name__.strip("_"), NOTE, f"could not be checked: {error}"))
    return found


def _versions() -> Finding:
    import numpy
    import torch

    from paceline import torch_versions

    values = {
        "paceline": paceline.__version__,
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "python": platform.python_version(),
        "glibc": platform.libc_ver()[1],
        "kernel": platform.release(),
    }
    text = ", ".join(f"{name} {version}" for name, version in values.items())
    if not torch_versions.OLDEST <= torch_versions.TORCH <= torch_versions.NEWEST_TRIED:
        oldest, newest = (".".join(map(str, v)) for v in (torch_versions.OLDEST, torch_versions.NEWEST_TRIED))
        fix = f"pip install 'torch>={oldest},<={newest}.99' if something fails"
        return Finding(
            "versions", WARNING, f"{text}; tried with torch {oldest} to {newest} only", fix, values=values
        )
    return Finding("versions", OK, text, values=values)


def _core() -> Finding:
    from paceline import core

    if core.missing:
        what, _, fix = core.missing.partition(". ")
        return Finding("core", PROBLEM, f"{what}: the native fabric cannot work, torch's stands in", fix)
    return Finding("core", OK, "the C++ core is loaded")


def _shared_segments() -> Finding:
    """Whether processes of one user can open each other's memory segments, as the native fabric requires."""
    descriptor = os.memfd_create("paceline-doctor", os.MFD_CLOEXEC)
    try:
        os.ftruncate(descriptor, 4096)
        words = [sys.executable, "-I", "-S", "-c", _PEEK, str(os.getpid()), str(descriptor)]
        done = subprocess.run(words, check=False, capture_output=True, text=True, timeout=30)
        os.close(os.pidfd_open(os.getpid()))
    finally:
        os.close(descriptor)
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else f"exit {done.returncode}"
        return Finding(
            "shared segments",
            PROBLEM,
            f"a process cannot open another process's memory segment ({reason}): the native fabric cannot"
            " work",
            "run the ranks in one container as one user, without a seccomp profile that hides /proc/PID/fd;"
            " or use --fabric torch",
        )
    return Finding("shared segments", OK, "processes can open each other's memory segments")


def _shared_memory() -> Finding:
    status = os.statvfs("/dev/shm")
    size, free = status.f_blocks * status.f_frsize, status.f_bavail * status.f_frsize
    text = f"/dev/shm: {size / 2**30:.2f} GiB, of which {free / 2**30:.2f} GiB are free"
    values = {"size_bytes": size, "free_bytes": free}
    if free < _LITTLE_SHM_BYTES:
        return Finding(
            "shared memory",
            WARNING,
            f"{text}; DataLoader workers pass batches through it and are killed by SIGBUS when it is full",
            "give it more (docker run --shm-size=2g; in Kubernetes an emptyDir with medium: Memory),"
            " or remount: mount -o remount,size=2g /dev/shm",
            values=values,
        )
    return Finding("shared memory", OK, text, values=values)


def _files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    text = f"open files: {soft} allowed, {hard} after `ulimit -n`"
    values = {"soft": soft, "hard": hard}
    if soft < _FEW_FILES:
        status = PROBLEM if soft < _TOO_FEW_FILES else WARNING
        best = hard if hard >= _FEW_FILES else 65536
        more = "" if hard >= _FEW_FILES else " (as root, or in /etc/security/limits.conf)"
        text += "; connections to all ranks and DataLoader workers need more"
        return Finding("open files", status, text, f"ulimit -n {min(best, 65536)}{more}", values=values)
    return Finding("open files", OK, text, values=values)


def _name() -> Finding:
    """Whether the host's own name resolves, and to an address that other hosts can use."""
    name = socket.gethostname()
    try:
        address = str(socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)[0][4][0])
    except OSError as error:
        return Finding(
            "own name",
            WARNING,
            f"{name!r} cannot be resolved on this host ({error.strerror or error}), as Gloo and MPI require",
            f"add a line `<address> {name}` to /etc/hosts",
        )
    if ipaddress.ip_address(address).is_loopback:
        message = f"{name!r} resolves to {address}: other software may give that address to other hosts"
        return Finding("own name", NOTE, f"{message}; Paceline does not", values={"address": address})
    return Finding("own name", OK, f"{name!r} is {address}", values={"address": address})


def _cores(local_ranks: int, environment: Mapping[str, str]) -> Finding:
    cores = len(os.sched_getaffinity(0))
    quota = _quota()
    usable = cores if quota is None else min(float(cores), quota)
    limit = "" if quota is None else f" (a quota of {quota:g} applies)"
    text = f"{cores} cores{limit} for {local_ranks} {'rank' if local_ranks == 1 else 'ranks'}"
    values = {"cores": cores, "quota": quota, "ranks": local_ranks}
    if local_ranks > usable:
        fix = f"start at most {max(1, int(usable))} ranks on this host"
        return Finding("cores", WARNING, f"{text}: ranks have to share cores", fix, values=values)
    threads = environment.get("OMP_NUM_THREADS", "")
    if threads.isdigit() and int(threads) * local_ranks > usable:
        text += f", each with OMP_NUM_THREADS={threads}: more threads than cores"
        fix = f"OMP_NUM_THREADS={max(1, int(usable) // local_ranks)}, or leave it to `paceline run`"
        return Finding("cores", WARNING, text, fix, values=values)
    return Finding("cores", OK, text, values=values)


def _quota() -> float | None:
    """The number of CPUs to which the control group limits this process; None: no limit."""
    try:  # version 2 of control groups
        limit, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return None if limit == "max" else int(limit) / int(period)
    except (OSError, ValueError):
        pass
    # version 1
    folder = Path("/sys/fs/cgroup/cpu")
    try:
        limit_us = int((folder / "cpu.cfs_quota_us").read_text())
        return limit_us / int((folder / "cpu.cfs_period_us").read_text()) if limit_us > 0 else None
    except (OSError, ValueError):
        return None
