"""Random faults in random jobs: every job ends in time, and the rank at fault is named.

    python tests/tools/faults 500 --seed 1 --results runs/faults.jsonl

Each trial starts a job of three workers, draws a strategy, a fabric, a phase and a fault, and notes how long
after the fault the launcher ended, its exit code, and whether it named the victim. Faults of the network run
on two hosts in network namespaces, and need root. Prints the trials that went wrong, and a table at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from netlab import Lab

SCRIPT = Path(__file__).with_name("script.py")
DEADLINE_S = 12.0
MARGIN_S = 10.0
START_S = 60.0  # for three processes on a busy machine
PROCESS_FAULTS = ("kill", "stop", "sleep", "loop", "leave", "raise")
NETWORK_FAULTS = ("cut", "one_way", "reset")
PHASES = ("init", "prepare", "train", "evaluate", "save", "close")
SURVIVORS = ("parameter_server", "gossip", "decentralized_threshold")
STRATEGIES = (*SURVIVORS, "all_reduce", "local_sgd", "bmuf", "slowmo", "diloco", "streaming_diloco")
FABRICS = ("shared_memory", "tcp", "gloo")


@dataclass(frozen=True)
class Trial:
    """One job and its fault."""

    number: int
    fault: str
    phase: str
    victim: int
    strategy: str
    fabric: str
    is_elastic: bool


@dataclass(frozen=True)
class Outcome:
    """How it ended."""

    seconds: float
    """From the fault to the end of the last launcher; negative: the fault did not come."""
    codes: tuple[int, ...]
    is_named: bool
    is_through: bool
    """Whether the other ranks came to the end."""
    output: str


def draw(number: int, rng: random.Random) -> Trial:
    """A trial: one in five has a fault of the network."""
    strategy = rng.choice(STRATEGIES)
    is_elastic = strategy in SURVIVORS and rng.random() < 0.5
    if rng.random() < 0.2:
        fabric = rng.choice(("tcp", "gloo"))
        return Trial(number, rng.choice(NETWORK_FAULTS), "train", 2, strategy, fabric, is_elastic)
    fault, phase = rng.choice(PROCESS_FAULTS), rng.choice(PHASES)
    return Trial(number, fault, phase, rng.randrange(3), strategy, rng.choice(FABRICS), is_elastic)


def command(trial: Trial, folder: str, *options: str) -> list[str]:
    """The launcher's command line."""
    fabric = ["--fabric", "torch"] if trial.fabric == "gloo" else []
    elastic = ["--min-workers", "2"] if trial.is_elastic else []
    what = [trial.fault, trial.phase, str(trial.victim), trial.strategy, str(DEADLINE_S), folder]
    return [
        *(sys.executable, "-m", "paceline.cli.main", "run", *options, *fabric, *elastic),
        *(str(SCRIPT), *what),
    ]


def wait(processes: list[subprocess.Popen[str]], until: float) -> list[str]:
    """Their output; a launcher that is still there at `until` is killed, and its output ends with OVERDUE."""
    outputs = []
    for process in processes:
        try:
            outputs.append(process.communicate(timeout=max(0.1, until - time.monotonic()))[0])
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
                time.sleep(5)
                os.killpg(process.pid, signal.SIGKILL)
            outputs.append(process.communicate()[0] + "\nOVERDUE")
    return outputs


def break_network(lab: Lab, fault: str, mark: Path, until: float) -> None:
    """What happens to the second host's cable once the script says that it is time."""
    while not mark.exists() and time.monotonic() < until:
        time.sleep(0.02)
    if fault == "cut":
        lab.set_link(1, up=False)
    elif fault == "one_way":
        lab.run(1, "tc qdisc add dev eth0 root tbf rate 8bit burst 1 limit 1".split())
    else:
        lab.run(1, ["ss", "-K", "dst", lab.address(0)])


def run(trial: Trial) -> Outcome:
    """One trial from its start to its end."""
    options = {
        "stdout": subprocess.PIPE,
        "stderr": subprocess.STDOUT,
        "text": True,
        "start_new_session": True,
    }
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        until = time.monotonic() + START_S + DEADLINE_S + MARGIN_S
        mark = Path(folder) / "fault"
        if trial.fault in NETWORK_FAULTS:
            lab = stack.enter_context(Lab(hosts=2))
            where = ("--nodes", "2", "--rendezvous", f"{lab.address(0)}:29400")
            key = Path(folder) / "key"
            key.write_text("0123456789abcdef" * 4)
            key.chmod(0o600)
            extra = {"PACELINE_SECRET_FILE": str(key), "RES_OPTIONS": "timeout:1 attempts:1"}
            processes = [
                lab.popen(h, command(trial, folder, *where, "-n", n), env=extra, **options)
                for h, n in enumerate("21")
            ]
            break_network(lab, trial.fault, mark, until)
        else:
            apart = {"PACELINE_TEST_APART": "1"} if trial.fabric == "tcp" else {}
            words = command(trial, folder, "-n", "3")
            processes = [subprocess.Popen(words, env={**os.environ, **apart}, **options)]
        outputs = wait(processes, until)
        ended = time.time()
        began = float(mark.read_text()) if mark.exists() else ended + 1.0
    text = "\n".join(outputs)
    others = [r for r in range(3) if r != trial.victim]
    return Outcome(
        round(ended - began, 1),
        tuple(p.returncode for p in processes),
        re.search(rf"rank {trial.victim}\b(?! is through)", text) is not None,
        all(f"rank {r} is through" in text for r in others),
        text,
    )


def judge(trial: Trial, outcome: Outcome) -> str:
    """What is wrong; "" if nothing is."""
    if outcome.seconds < 0:
        return "the fault did not come"
    if outcome.seconds > DEADLINE_S + MARGIN_S or "OVERDUE" in outcome.output:
        return "too late"
    if not any(outcome.codes) and not outcome.is_through:
        return "exit code 0 without an end"
    is_harmless = trial.fault in ("leave", "reset") and outcome.is_through
    if not outcome.is_named and not is_harmless:
        return "not named"
    if any(outcome.codes) and trial.is_elastic and trial.victim and trial.phase == "train":
        return "did not go on" if trial.fault not in NETWORK_FAULTS else ""
    return ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("count", type=int)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2, help="trials at a time")
    parser.add_argument("--only", help="numbers of trials, with commas")
    parser.add_argument("--results", type=Path, default=Path("runs/faults.jsonl"))
    options = parser.parse_args()
    rng = random.Random(options.seed)
    trials = [draw(number, rng) for number in range(options.count)]
    if options.only:
        trials = [trials[int(number)] for number in options.only.split(",")]
    options.results.parent.mkdir(parents=True, exist_ok=True)
    wrong: Counter[str] = Counter()
    with options.results.open("a") as results, ThreadPoolExecutor(options.jobs) as pool:
        for trial, outcome in zip(trials, pool.map(run, trials), strict=True):
            verdict = judge(trial, outcome)
            wrong[verdict or "right"] += 1
            row = {**asdict(trial), **asdict(outcome), "verdict": verdict}
            results.write(json.dumps(row) + "\n")
            results.flush()
            if verdict:
                print(f"{verdict}: {trial} {outcome.seconds} s, codes {outcome.codes}", flush=True)
    print(dict(wrong))


if __name__ == "__main__":
    main()
