"""A Python function as a job: carried to the workers and its results back, as multiprocessing's spawn does.

Both directions are files in a folder that only the user can read. They are pickled, like everything that
multiprocessing sends between a parent and its own children. Where an engine carries them to another host and
back, they go over its own channels, to which users entrust pickles anyway.
"""

from __future__ import annotations

import inspect
import os
import pickle
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
from paceline.errors import ConfigError

importing_main = threading.Event()
"""Set in a worker while it imports the script that called `launch`."""

_FOLDER = "PACELINE_CALL"  # the environment variable by which a worker finds the call's folder
_BOOTSTRAP = "import sys; from paceline.launchers.call import main; main(sys.argv.pop())"


class Call:
    """A function with its arguments, in a folder; use as a context manager."""

    def __init__(
        self, fn: Callable[..., Any], args: Sequence[Any], *, dumps: Callable[[Any], bytes] | None = None
    ) -> None:
        if importing_main.is_set():
            raise ConfigError(
                "launch() was called again while a worker imported your script; "
                "put the call under `if __name__ == '__main__':`"
            )
        self._passes_rank = _passes_rank(fn, args)
        # Without the key of multiprocessing's own connections, for which workers have no use, and without the
        # current directory, which the job may set.
        preparation = spawn.get_preparation_data("worker")
        preparation = {k: v for k, v in preparation.items() if k not in ("authkey", "dir")}
        if dumps is not None:  # functions of the main script travel by value: it is not imported elsewhere
            preparation = {k: v for k, v in preparation.items() if not k.startswith("init_main_from")}
        try:
            self.content = pickle.dumps(
                (preparation, (dumps or pickle.dumps)((fn, tuple(args), self._passes_rank)))
            )
        except Exception as error:
            raise ConfigError(
                f"launch({_name(fn)}): the function and its arguments travel to new processes and cannot be "
                f"pickled ({error}); define the function at the top level of a module or script"
            ) from error
        self._folder = tempfile.TemporaryDirectory(prefix="paceline-call-")
        (Path(self._folder.name) / "call").write_bytes(self.content)

    def __enter__(self) -> Call:
        return self

    def __exit__(self, *_: object) -> None:
        self._folder.cleanup()

    @property
    def command(self) -> tuple[str, ...]:
        """What a worker executes."""
        return (sys.executable, "-u", "-c", _BOOTSTRAP, self._folder.name)

    def leave(self, kind: str, rank: int, content: bytes) -> None:
        """Put a "result" or an "error" that a worker on another host left there into the folder."""
        (Path(self._folder.name) / f"{kind}.{rank}").write_bytes(content)

    def result(self, rank: int) -> Any:
        """What the function returned on `rank`."""
        return pickle.loads((Path(self._folder.name) / f"result.{rank}").read_bytes())

    def results(self, *, lost: Set[int] = frozenset()) -> list[Any]:
        """What the function returned on every rank that left a result, in order; None for the lost."""
        found = {int(p.suffix[1:]) for p in Path(self._folder.name).glob("result.[0-9]*")}
        return [None if rank in lost else self.result(rank) for rank in sorted(found | lost)]

    def exception(self, rank: int) -> BaseException | None:
        """What the function raised on `rank`, if it could be carried over."""
        try:
            value = pickle.loads((Path(self._folder.name) / f"error.{rank}").read_bytes())
        except Exception:  # a user's exception class may do anything while it is unpickled
            return None
        return value if isinstance(value, BaseException) else None

    def first_exception(self) -> tuple[int, BaseException] | None:
        """(rank, what it raised) of the rank that failed first, for engines that report no rank."""
        left = sorted(Path(self._folder.name).glob("error.[0-9]*"), key=lambda p: p.stat().st_mtime_ns)
        for path in left:
            rank = int(path.suffix[1:])
            if (error := self.exception(rank)) is not None:
                return rank, error
        return None


def _name(fn: Callable[..., Any]) -> str:
    return str(getattr(fn, "__qualname__", fn))


def _passes_rank(fn: Callable[..., Any], args: Sequence[Any]) -> bool:
    """Whether to call `fn(rank, *args)`, because `fn(*args)` does not fit."""
    if not callable(fn):
        raise ConfigError(f"launch(): a function expected, got {type(fn).__name__}")
    if not isinstance(args, tuple | list):
        raise ConfigError(f"launch({_name(fn)}): args must be a tuple, got {type(args).__name__}")
    try:
        signature = inspect.signature(fn)
    except (ValueError, TypeError):  # built-in without a signature
        return False
    for given, passes_rank in ((tuple(args), False), ((0, *args), True)):
        try:
            signature.bind(*given)
        except TypeError:
            continue
        return passes_rank
    raise ConfigError(
        f"launch({_name(fn)}): it takes {signature}, and args has {len(args)} values; "
        "it is called as fn(*args), or as fn(rank, *args) if it takes one more"
    )


def main(folder: str) -> None:
    """A worker's body: import the caller's script, call the function, leave the result."""
    rank = who_am_i(os.environ).rank
    os.environ[_FOLDER] = folder
    preparation, payload = pickle.loads((Path(folder) / "call").read_bytes())
    importing_main.set()
    spawn.prepare(preparation)
    importing_main.clear()
    fn, args, passes_rank = pickle.loads(payload)
    try:
        value = fn(rank, *args) if passes_rank else fn(*args)
    except Exception as error:
        error.__traceback__ = error.__traceback__ and error.__traceback__.tb_next
        traceback.print_exception(error)
        _leave(Path(folder) / f"error.{rank}", error, may_fail=True)
        pmi.abort(os.environ)
        sys.exit(1)
    _leave(Path(folder) / f"result.{rank}", value, may_fail=False)


def keep_progress(content: bytes) -> None:
    """In a worker: leave `content` with the launcher, for `progress` in the next attempt to find."""
    folder = Path(os.environ[_FOLDER])
    (folder / "progress.partial").write_bytes(content)
    os.replace(folder / "progress.partial", folder / "progress")


def progress() -> bytes | None:
    """In a worker: what an attempt before this one kept last, on whatever rank."""
    path = Path(os.environ[_FOLDER]) / "resume"
    return path.read_bytes() if path.is_file() else None


def _leave(path: Path, value: Any, *, may_fail: bool) -> None:
    try:
        content = pickle.dumps(value)
    except Exception as error:
        if may_fail:
            return
        raise TypeError(
            f"the function's result, of type {type(value).__name__}, cannot be pickled"
        ) from error
    path.with_suffix(".partial" + path.suffix).write_bytes(content)
    os.replace(path.with_suffix(".partial" + path.suffix), path)
