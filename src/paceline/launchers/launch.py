"""`paceline.launch`: a function on many workers of any engine, its results and its errors."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from paceline.errors import PacelineError, WorkerFailed
from paceline.launchers import runner as runners
from paceline.launchers.function_call import FunctionCall
from paceline.launchers.job import JobSpec, Resources
from paceline.launchers.processes.console import Console
from paceline.launchers.processes.outcome import Outcome
from paceline.options import JobOptions


def launch(
    fn: Callable[..., Any],
    *,
    num_workers: int,
    args: Sequence[Any] = (),
    on: str = runners.DEFAULT,
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
    """Run `fn(*args)` in new processes and return their results, in rank order.

    Inside `fn`, `paceline.init()` and `torch.distributed.init_process_group()` find the other workers.

    Args:
        fn: The function, which workers import by name as with multiprocessing's spawn: it must be at the top
            level of a module or of the script. On Ray and Spark it may also be a closure. If it takes one
            argument more than `args` holds, its rank is passed first.
        num_workers: Workers on each of `nodes` hosts.
        args: Arguments of `fn`; they and the results are pickled.
        on: The engine that runs the workers: "local" (this host), "ray", "spark", "slurm" or "mpi".
        strategy: Overrides the strategy that `fn` gives to `prepare`; None: as `fn` says.
        fabric: What carries the workers' tensors: "native" or "torch"; None: native, or torch for models on a
            GPU.
        checkpoint: Path to resume from if a checkpoint is there, and to save to on SIGTERM; None: neither.
        threads: Intra-op threads per worker; None: this host's cores / workers.
        max_restarts: How many times all workers are restarted after a failure; None: the engine's own policy
            (local: never).
        progress: Whether workers show progress bars.
        grace_s: Seconds between SIGTERM and SIGKILL when the job is stopped; None: 30 with `checkpoint`, else
            5.
        nodes: Hosts; default 1.
        resources: What each worker needs; None: what the engine gives by default.
        environment: Variables added to what workers inherit.
        working_directory: Where workers run, the same path on every host; None: the current directory.
        ship: A folder of code that the engine sends to its hosts; workers run in a copy of it there.
        min_workers: Continue after losing workers while this many live; None: any loss is a failure.
        max_workers: Start up to this many workers when the engine has room; None: only those asked for.
        engine_options: What only one engine knows, e.g. {"address": "10.0.0.1:6379"} for Ray.

    Returns:
        What `fn` returned on each rank; None for a worker that died while the job continued without it.

    Raises:
        WorkerFailed: A worker raised or died; with rank and traceback. The other workers are stopped first.
        PacelineError: A worker raised a PacelineError: it is raised again with its own class.
        ConfigError: The engine is unknown, is not installed, or cannot do what is asked.

    Example:
        losses = paceline.launch(train, num_workers=4, args=(0.1,), strategy="local_sgd(period=16)")
    """
    runner = runners.make(on)
    runner.check_installed()
    options = JobOptions(strategy=strategy, fabric=fabric, checkpoint=checkpoint, progress=progress)
    with FunctionCall(fn, args, dumps=runner.dumps) as call:
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
        runner.check(job)
        outcome = runner.run(job, console=Console())
        return results_of(outcome, call)


def results_of(outcome: Outcome, call: FunctionCall) -> list[Any]:
    """What the workers returned, in rank order; raises what `launch` raises."""
    if (failure := outcome.failure) is not None:
        text = "\n".join([failure.headline, *failure.traceback])
        raise _error(text, cause=call.exception(failure.rank))
    if outcome.signal is not None:
        _repeat_signal(outcome.signal)
    if outcome.exit_code:
        if (first := call.first_exception()) is None:
            raise WorkerFailed(f"the engine ended with exit code {outcome.exit_code}; see what it printed")
        rank, exception = first
        raise _error(f"rank {rank}: {type(exception).__name__}: {exception}", cause=exception)
    return call.results(lost=outcome.lost)


def _error(text: str, *, cause: BaseException | None) -> PacelineError:
    """The error to raise for a worker's exception: of the same class if that is one of Paceline's."""
    error: PacelineError = type(cause)(text) if isinstance(cause, PacelineError) else WorkerFailed(text)
    error.__cause__ = cause
    return error


def _repeat_signal(number: signal.Signals) -> None:
    """Do what this process would have done on the signal if `launch` had not caught it."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt
    signal.raise_signal(number)
    raise SystemExit(128 + number)  # the caller's own handler returned
