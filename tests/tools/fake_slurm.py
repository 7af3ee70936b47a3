"""`srun`, `sbatch`, `scontrol` and `scancel` for one machine: real processes with Slurm's environment.

Installed on a PATH as scripts that call `main(name, …)`. "Nodes" are 127.0.0.1, 127.0.0.2, …
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path


def install(folder: Path) -> str:
    """Write the programs into `folder`; returns a PATH that begins with it."""
    for name in ("srun", "sbatch", "scontrol", "scancel"):
        program = folder / name
        here = str(Path(__file__).parent)
        program.write_text(
            f"#!{sys.executable}\nimport sys\nsys.path.insert(0, {here!r})\n"
            f"from fake_slurm import main\nmain({name!r}, sys.argv[1:], {str(folder)!r})\n"
        )
        program.chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def main(name: str, words: list[str], folder: str) -> None:
    """Be the program of that name."""
    {"srun": srun, "sbatch": sbatch, "scontrol": scontrol, "scancel": scancel}[name](words, Path(folder))


def sbatch(words: list[str], folder: Path) -> None:
    script = Path(words[-1])
    options = {
        m[1]: m[2] or ""
        for line in script.read_text().splitlines()
        if (m := re.fullmatch(r"#SBATCH --([a-z-]+)(?:=(.*))?", line))
    }
    number = "4711"
    print(number, flush=True)
    environment = {
        **os.environ,
        "SLURM_JOB_ID": number,
        "SLURM_JOB_NODELIST": f"127.0.0.[1-{options['nodes']}]",
        "SLURM_JOB_NUM_NODES": options["nodes"],
        "SLURM_PROCID": "0",  # as in a real batch step
        "SLURM_NTASKS": str(int(options["nodes"]) * int(options["ntasks-per-node"])),
    }
    code = 0
    for attempt in range(5):
        (folder / "requeue").unlink(missing_ok=True)
        environment["SLURM_RESTART_COUNT"] = str(attempt)
        with open(options["output"].replace("%j", number), "ab") as output:
            batch = subprocess.Popen(["bash", str(script)], env=environment, stdout=output, stderr=output)
        (folder / "batch.pid").write_text(str(batch.pid))
        code = batch.wait()
        if not (folder / "requeue").exists():
            break
    sys.exit(code if "--wait" in words else 0)


def srun(words: list[str], folder: Path) -> None:
    command = [w for i, w in enumerate(words) if not w.startswith("--") or _after_command(words, i)]
    options = dict(w[2:].partition("=")[::2] for w in words if w.startswith("--"))
    tasks, per_node, nodes = (int(options[k]) for k in ("ntasks", "ntasks-per-node", "nodes"))
    children = []
    for rank in range(tasks):
        environment = {
            **os.environ,
            "SLURM_PROCID": str(rank),
            "SLURM_LOCALID": str(rank % per_node),
            "SLURM_NODEID": str(rank // per_node),
            "SLURM_STEP_ID": "0",
            "SLURM_STEP_NUM_TASKS": str(tasks),
            "SLURM_STEP_TASKS_PER_NODE": f"{per_node}(x{nodes})" if nodes > 1 else str(per_node),
            "SLURM_STEP_NODELIST": f"127.0.0.[1-{nodes}]" if nodes > 1 else "127.0.0.1",
            "SLURM_JOB_ID": os.environ.get("SLURM_JOB_ID", "4711"),
        }
        child = subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
        )
        children.append(child)
        (folder / f"task.{rank}.pid").write_text(str(child.pid))

    def forward(number: int, _: object) -> None:
        for one in children:
            if one.poll() is None:
                os.killpg(one.pid, number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, forward)
    readers = [threading.Thread(target=_label, args=(r, c)) for r, c in enumerate(children)]
    for reader in readers:
        reader.start()
    codes: dict[int, int] = {}
    while len(codes) < tasks:
        for rank, child in enumerate(children):
            try:
                codes[rank] = child.wait(0.05)
            except subprocess.TimeoutExpired:
                continue
            if codes[rank] and options.get("kill-on-bad-exit") == "1":
                forward(signal.SIGTERM, None)
    for reader in readers:
        reader.join()
    worst = max(c if c >= 0 else 128 - c for c in codes.values())
    sys.exit(next((c for c in codes.values() if c > 0), worst))


def scontrol(words: list[str], folder: Path) -> None:
    assert words == ["requeue", "4711"], words
    (folder / "requeue").touch()


def scancel(words: list[str], folder: Path) -> None:
    assert words == ["4711"], words
    for file in [*folder.glob("task.*.pid"), folder / "batch.pid"]:
        try:
            os.kill(int(file.read_text()), signal.SIGKILL)
        except ProcessLookupError:
            pass


def _after_command(words: list[str], index: int) -> bool:
    return any(not w.startswith("--") for w in words[:index])


def _label(rank: int, child: subprocess.Popen[bytes]) -> None:
    assert child.stdout is not None
    for line in child.stdout:
        sys.stdout.buffer.write(b"%d: %s" % (rank, line))
        sys.stdout.buffer.flush()
