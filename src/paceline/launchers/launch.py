"""`paceline.launch`: a function on many workers of any engine, its results and its errors."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paceline.errors import PacelineError, WorkerFailed
from paceline.launchers import runner as engines
from paceline.launchers.call import Call
from paceline.launchers.job import JobSpec, Resources
from paceline.launchers.processes.console import Console
from paceline.options import JobOptions

if TYPE_CHECKING:
    from paceline.launchers.processes.failure import Failure
    from paceline.launchers.runner import Outcome


def launch(
    fn: Callable[..., Any],
    *,
    num_workers: int,
    args: Sequence[Any] = (),
    on: str = engines.DEFAULT,
    strategy: str | None = None,
    fabric: str | None = None,
    checkpoint: str | None = None,
    threads: int | None = None,
    max_restarts: int | None = None,
    progress: bool = True,
    grace_s: float | None = None,
    nodes: int = 1,
    resources: Resources | None = None,
    environment: Mapping[str, str] | None = None,
    working_directory: str | os.PathLike[str] | None = None,
    ship: str | os.PathLike[str] | None = None,
    min_workers: int | None = None,
    max_workers: int | None = None,
    engine_options: Mapping[str, str] | None = None,
) -> list[Any]:
    """Run `fn(*args)` in `num_workers` new processes and return their results, in order of rank.

    `on` names the engine that runs them: "local" (this host), "ray", "spark", … `fn` must be importable by
    name (top level of a module or of the script), as for multiprocessing's spawn. If it takes one argument
    more than `args` holds, its rank is passed first. In it, `paceline.init()` and
    `torch.distributed.init_process_group()` find the other workers. Results and arguments are pickled.
    The other arguments are those of `paceline run` and are explained at `JobSpec`. A worker that died, and
    that the job went on without (`min_workers`), has the result None.

    Raises WorkerFailed, with rank and traceback, if a worker raises or dies; a PacelineError is raised again
    as itself. The other workers are ended first. Raises ConfigError if the engine is unknown, is not
    installed, or cannot do what is asked.
    """
    engine = engines.make(on)
    engine.check_installed()
    options = JobOptions(strategy=strategy, fabric=fabric, checkpoint=checkpoint, progress=progress)
    with Call(fn, args, dumps=engine.dumps) as call:
        job = JobSpec(
            command=call.command,
            call=call,
            num_workers=num_workers,
            options=options,
            threads=threads,
            max_restarts=max_restarts,
            grace_s=grace_s,
            nodes=nodes,
            resources=resources,
            environment=environment or {},
            working_directory=None if working_directory is None else Path(working_directory),
            ship=None if ship is None else Path(ship),
            min_workers=min_workers,
            max_workers=max_workers,
            engine_options=engine_options or {},
        )
        engine.check(job)
        outcome = engine.run(job, console=Console())
        return results_of(outcome, call)


def results_of(outcome: Outcome, call: Call) -> list[Any]:
    """What the workers returned; raises what `launch` raises."""
    if outcome.failure is not None:
        raise _error(outcome.failure, call.exception(outcome.failure.rank))
    if outcome.signal is not None:
        _be_ended_by(outcome.signal)
    if outcome.exit_code:
        if (first := call.first_exception()) is None:
            raise WorkerFailed(f"the engine ended with exit code {outcome.exit_code}; see what it printed")
        rank, original = first
        raise _named(original, f"rank {rank}: {type(original).__name__}: {original}")
    return call.results(lost=outcome.lost)


def _error(failure: Failure, original: BaseException | None) -> PacelineError:
    return _named(original, "\n".join([failure.headline, *failure.traceback]))


def _named(original: BaseException | None, text: str) -> PacelineError:
    if isinstance(original, PacelineError):
        error: PacelineError = type(original)(text)
    else:
        error = WorkerFailed(text)
    error.__cause__ = original
    return error


def _be_ended_by(number: signal.Signals) -> None:
    """What this process would have done on the signal, had `launch` not been running."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    signal.raise_signal(number)
    raise SystemExit(128 + number)  # a handler of the caller's returned
