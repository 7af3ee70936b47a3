"""Every function that reads what a user wrote is fuzzed, or its input comes from elsewhere.

A function counts as such a parser if it is named like one, or calls something that reads text: JSON, files,
numbers. `input_parsers.PARSERS` says which of them the fuzzed inputs run.
"""

from __future__ import annotations

import ast
from pathlib import Path

from input_parsers import PARSERS

PACKAGE = Path(__file__).resolve().parents[2] / "src" / "paceline"
NAMES = ("parse", "from_json", "from_environment", "expand", "read_secret", "who_am_i")
CALLS = (
    "ast.literal_eval",
    "ast.parse",
    "csv.DictReader",
    "csv.reader",
    "importlib.util.spec_from_file_location",
    "json.load",
    "json.loads",
    "np.load",
    "pickle.loads",
    "torch.load",
    "yaml.safe_load",
    "digits",
)
METHODS = (".isdigit", ".fullmatch", ".read_bytes", ".read_text", ".read_json", ".digits")
# Parsers of what Paceline, an engine or the kernel wrote, with the reason; a folder stands for all in it.
OTHER_INPUT = {
    "bench/calibration.py": "what a comparison wrote; tests/bench/test_calibration.py damages it",
    "bench/collective_worker.py": "commands of the benchmark's own driver",
    "bench/collectives.py:Team._meet": "from workers of the benchmark, after its token",
    "bench/collectives.py:Team.ask": "from workers of the benchmark, after its token",
    "bench/hardware.py": "/proc",
    "bench/imagenet.py": "the row that our own example script wrote",
    "cli/verbs/errors.py": "a page of the package",
    "comm/messages": "frames of authenticated peers; tests/comm/messages damages them",
    "comm/native/tuning.py:tune": "what rank 0 sent",
    "comm/rendezvous/meeting.py": "the job's store, and /proc",
    "comm/rendezvous/lost_ranks.py": "the launcher's store, behind its handshake",
    "comm/rendezvous/stores.py:_status": "/proc",
    "comm/rendezvous/pmi.py": "a descriptor's number from Hydra",
    "compat": "requests of authenticated peers, and files that the same run wrote",
    "declarations.py": "files of the package",
    "doctor": "/proc and /sys, and the job's store",
    "launchers/engines/slurm.py": "what sbatch printed",
    "launchers/function_call.py": "files that the same launch wrote",
    "launchers/job.py:JobSpec.worker_threads": "a number, or it is ignored",
    "launchers/manifest.py": "a name that is matched, not read",
    "launchers/processes/loss_watch.py": "/proc",
    "launchers/processes/watchdog.py": "/proc",
    "launchers/ray/cluster.py": "an address that a connection is tried to",
    "launchers/remote": "messages of supervisors after authentication, and files of this host's workers",
    "launchers/spark/session.py": "an address that a connection is tried to",
    "report": "a style sheet of the package",
    "train/saving/checkpoint.py:_is_shard": "names of files",
    "comm/rendezvous/interfaces.py:text_or_empty": "files of the kernel",
    "train/saving/checkpoint.py:_remove_older": "names of files",
    "train/saving/storable.py:_try": "what it has just written itself",
    "train/logs/logbook.py:Logbook._collect": "rows of other ranks in the job's store",
    "train/plain.py": "what ranks of the job packed",
    "user_input.py": "what the parsers of this list call",
}


def parsers() -> set[str]:
    """`file:function` of all functions that count as parsers."""
    found = set()
    for path in sorted(PACKAGE.rglob("*.py")):
        place = str(path.relative_to(PACKAGE))
        for prefix, node in functions(ast.parse(path.read_text())):
            calls = {ast.unparse(n.func) for n in ast.walk(node) if isinstance(n, ast.Call)}
            reads = calls & set(CALLS) or [c for c in calls if c.endswith(METHODS)]
            if node.name.startswith("parse") or node.name in NAMES or reads:
                found.add(f"{place}:{prefix}{node.name}")
    return found


def functions(tree: ast.Module) -> list[tuple[str, ast.FunctionDef]]:
    """Functions of a module, and methods with their class's name in front."""
    own = [("", n) for n in tree.body if isinstance(n, ast.FunctionDef)]
    classes = [n for n in tree.body if isinstance(n, ast.ClassDef)]
    return own + [(f"{c.name}.", m) for c in classes for m in c.body if isinstance(m, ast.FunctionDef)]


def is_other(parser: str) -> bool:
    file, _, _ = parser.partition(":")
    return any(parser == o or file == o or file.startswith(f"{o}/") for o in OTHER_INPUT)


def fuzzed() -> set[str]:
    covered = [path.partition(":") for parser in PARSERS for path in parser.covers]
    found = set()
    for module, _, name in covered:
        folder = PACKAGE / module.replace(".", "/")
        file = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
        found.add(f"{file.relative_to(PACKAGE)}:{name}")
    return found


def test_every_parser_of_user_input_is_fuzzed() -> None:
    missing = sorted(p for p in parsers() - fuzzed() if not is_other(p))
    assert not missing, f"add them to tests/tools/input_parsers.py, or here with a reason: {missing}"


def test_the_registry_names_functions_that_exist() -> None:
    defined = {
        f"{path.relative_to(PACKAGE)}:{prefix}{node.name}"
        for path in PACKAGE.rglob("*.py")
        for prefix, node in functions(ast.parse(path.read_text()))
    }
    nested = {"cli/arguments/schedule.py:read"}
    assert not sorted(fuzzed() - defined - nested)
    here = parsers()
    unused = [o for o in OTHER_INPUT if not any(p == o or p.startswith((f"{o}:", f"{o}/")) for p in here)]
    assert not unused, f"no parser is there any more: {unused}"
