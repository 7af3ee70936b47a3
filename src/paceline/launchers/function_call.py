"""A Python function as a job: carried to the workers and its results back, as multiprocessing's spawn does.

Both directions are files in a folder that only the user can read. They are pickled, like everything that
multiprocessing sends between a parent and its own children. Engines with workers on other hosts carry the
same bytes over their own channels, which carry users' pickles anyway.
"""

from __future__ import annotations

import os
import pickle
import pickletools
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Sequence, Set
from multiprocessing import spawn
from pathlib import Path
from typing import Any

from paceline.comm.rendezvous import pmi
from paceline.comm.rendezvous.environment import who_am_i
from paceline.errors import ConfigError, WorkerFailed
from paceline.types import named
from paceline.worker_function import name_of, takes_rank

importing_main = threading.Event()
"""Set in a worker while it imports the script that called `launch`."""

_FOLDER = "PACELINE_CALL"  # the environment variable that tells a worker where the call's folder is
_MAIN_PATH = "init_main_from_path"
_BOOTSTRAP = (
    "import sys; from paceline.launchers.function_call import entry_point; entry_point(sys.argv.pop())"
)


class FunctionCall:
    """A function with its arguments, in a folder; use as a context manager.

    Args:
        fn: What each worker calls, as `fn(*args)` or `fn(rank, *args)`.
        args: Its arguments.
        dumps: Pickles the function and its arguments; None: `pickle.dumps`, which stores functions by name.
            With cloudpickle's, functions of the main script travel by value.

    Raises:
        ConfigError: The function or its arguments cannot be pickled, do not fit each other, or are defined
            where workers cannot import them; or a worker calls this while it imports the user's script.
    """

    def __init__(
        self, fn: Callable[..., Any], args: Sequence[Any], *, dumps: Callable[[Any], bytes] | None = None
    ) -> None:
        if importing_main.is_set():
            raise ConfigError(
                "launch() was called again while a worker imported your script; "
                "put the call under `if __name__ == '__main__':`"
            )
        if not isinstance(args, tuple | list):
            raise ConfigError(f"launch({name_of(fn)}): args must be a tuple, got {type(args).__name__}")
        passes_rank = takes_rank(fn, args, caller="launch")
        # Left out: the key of multiprocessing's own connections, which workers do not use, and the current
        # directory, which the job may set.
        preparation = spawn.get_preparation_data("worker")
        preparation = {k: v for k, v in preparation.items() if k not in ("authkey", "dir")}
        has_main = "init_main_from_name" in preparation or Path(preparation.get(_MAIN_PATH, "")).is_file()
        if dumps is not None or not has_main:  # by value, workers do not need it; without a file, have none
            preparation = {k: v for k, v in preparation.items() if not k.startswith("init_main_from")}
        try:
            payload = (dumps or pickle.dumps)((fn, tuple(args), passes_rank))
            self.content = pickle.dumps((preparation, payload))
        except Exception as error:
            raise ConfigError(
                f"launch({name_of(fn)}): the function and its arguments travel to new processes and cannot"
                f" be pickled ({error}); define the function at the top level of a module or script"
            ) from error
        if dumps is None and not has_main and _names_main(payload):
            raise ConfigError(
                f"launch({name_of(fn)}): it is defined where new processes cannot import it: in python -c, on"
                " standard input, at a prompt or in a notebook. Write it into a file beside and import it"
                " from there"
            )
        self._folder = tempfile.TemporaryDirectory(prefix="paceline-call-")
        (Path(self._folder.name) / "call").write_bytes(self.content)

    def __enter__(self) -> FunctionCall:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    @property
    def command(self) -> tuple[str, ...]:
        """What a worker executes; the folder is the last word."""
        return (sys.executable, "-u", "-c", _BOOTSTRAP, self._folder.name)

    def store_result(self, rank: int, content: bytes) -> None:
        """Put the pickled result of a worker on another host into the folder."""
        (Path(self._folder.name) / f"result.{rank}").write_bytes(content)

    def store_error(self, rank: int, content: bytes) -> None:
        """Put the pickled exception of a worker on another host into the folder."""
        (Path(self._folder.name) / f"error.{rank}").write_bytes(content)

    def result(self, rank: int) -> Any:
        """What the function returned on `rank`."""
        return pickle.loads((Path(self._folder.name) / f"result.{rank}").read_bytes())

    def results(self, *, lost: Set[int] = frozenset()) -> list[Any]:
        """What the function returned on each rank, in rank order; None for `lost` ones.

        Raises WorkerFailed for a rank that ended without an error and without a result.
        """
        found = {int(p.suffix[1:]) for p in Path(self._folder.name).glob("result.[0-9]*")} | lost
        if missing := set(range(max(found, default=-1) + 1)) - found:
            raise WorkerFailed(
                f"{named(sorted(missing))} ended with exit code 0 and left no result: does the function call"
                " os._exit(), or replace the process?"
            )
        return [None if rank in lost else self.result(rank) for rank in sorted(found)]

    def exception(self, rank: int) -> BaseException | None:
        """What the function raised on `rank`; None if it could not be pickled."""
        try:
            value = pickle.loads((Path(self._folder.name) / f"error.{rank}").read_bytes())
        except Exception:  # a user's exception class may raise while it is unpickled
            return None
        return value if isinstance(value, BaseException) else None

    def first_exception(self) -> tuple[int, BaseException] | None:
        """(rank, exception) of the rank that failed first, for engines that do not report the rank."""
        paths = sorted(Path(self._folder.name).glob("error.[0-9]*"), key=lambda p: p.stat().st_mtime_ns)
        for path in paths:
            rank = int(path.suffix[1:])
            if (error := self.exception(rank)) is not None:
                return rank, error
        return None


def entry_point(folder: str) -> None:
    """What a worker runs: import the caller's script, call the function, store its result in `folder`."""
    rank = who_am_i(os.environ).rank
    os.environ[_FOLDER] = folder
    preparation, payload = pickle.loads((Path(folder) / "call").read_bytes())
    importing_main.set()
    spawn.prepare(preparation)
    importing_main.clear()
    fn, args, passes_rank = pickle.loads(payload)
    try:
        value = fn(rank, *args) if passes_rank else fn(*args)
    except SystemExit as end:
        if end.code:
            raise
        value = None  # it left early without an error: its place in the results stays its own
    except Exception as error:
        error.__traceback__ = error.__traceback__ and error.__traceback__.tb_next
        traceback.print_exception(error)
        try:
            content = pickle.dumps(error)
        except Exception:  # not every exception can be pickled; its traceback has been printed
            pass
        else:
            _write(Path(folder) / f"error.{rank}", content)
        pmi.abort(os.environ)
        sys.exit(1)
    try:
        content = pickle.dumps(value)
    except Exception as error:
        raise TypeError(
            f"the function's result, of type {type(value).__name__}, cannot be pickled"
        ) from error
    _write(Path(folder) / f"result.{rank}", content)


def _names_main(payload: bytes) -> bool:
    """Whether something in a pickle is to be found in the module `__main__`."""
    return any(argument == "__main__" for _, argument, _ in pickletools.genops(payload))


def keep_progress(content: bytes) -> None:
    """In a worker: give `content` to the launcher, so that `progress` finds it in the next attempt."""
    folder = Path(os.environ[_FOLDER])
    (folder / "progress.partial").write_bytes(content)
    os.replace(folder / "progress.partial", folder / "progress")


def progress() -> bytes | None:
    """In a worker: what any rank of an earlier attempt kept last."""
    path = Path(os.environ[_FOLDER]) / "resume"
    return path.read_bytes() if path.is_file() else None


def _write(path: Path, content: bytes) -> None:
    """Write a file that appears only when it is complete."""
    partial = path.with_suffix(".partial" + path.suffix)
    partial.write_bytes(content)
    os.replace(partial, path)
