"""Where ranks do different things: what rank 0 does alone or first, and who draws which random numbers."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ParamSpec, TypeVar

from paceline.comm.communicator import FabricCommunicator
from paceline.errors import ConfigError, Mismatch, PacelineError
from paceline.spec import whole_number
from paceline.train import exchange, random_state
from paceline.train.calls.turns import Turns
from paceline.train.data.following import Loaders
from paceline.train.progress import ProgressBar
from paceline.types import named

_FIRST = "paceline.main_first"
P = ParamSpec("P")
R = TypeVar("R")


class RankCalls:
    """`job.print`, `job.on_main`, `job.main_first` and `job.set_seed`."""

    comm: FabricCommunicator
    turns: Turns
    loaders: Loaders
    is_main: bool
    _progress: ProgressBar
    _seed: int | None
    _has_prepared: bool

    def print(self, *values: object, **keywords: Any) -> None:
        """`print` on rank 0 only.

        Args:
            values: As for `print`.
            keywords: As for `print`.
        """
        if self.is_main:
            self._progress.print(*values, **keywords)

    def on_main(self, function: Callable[P, R]) -> Callable[P, R | None]:
        """Decorate a function that only rank 0 is to run; for a few lines write `if job.is_main:`.

        The function must not call what all ranks have to call together (`save`, `evaluate`, `barrier`, …).

        Args:
            function: Runs on rank 0; on the others a call returns None.

        Returns:
            The function to call on all ranks.

        Example:
            ```
            @job.on_main
            def report(loss): print(loss)
            ```
        """

        kinds = (inspect.iscoroutinefunction, inspect.isgeneratorfunction, inspect.isasyncgenfunction)
        if any(kind(function) for kind in kinds):
            raise ConfigError(
                f"@job.on_main of {getattr(function, '__name__', function)}: a plain function expected; the"
                " other ranks would get None instead of something to await or to iterate. Write `if"
                " job.is_main:`"
            )

        @functools.wraps(function)
        def on_rank_0(*arguments: P.args, **keywords: P.kwargs) -> R | None:
            return function(*arguments, **keywords) if self.is_main else None

        return on_rank_0

    @contextmanager
    def main_first(self, *, local: bool = False) -> Iterator[None]:
        """Rank 0 runs the block first, the other ranks when it is done; all ranks enter.

        For what one process should do and the others find done: a download, a cache that is built. The block
        must not call what all ranks have to call together. The others wait as long as an operation may take
        (`init(timeout_s=)`).

        Args:
            local: Whether the first rank of each host goes first, for folders that hosts do not share;
                default False: rank 0 alone.

        Raises:
            PacelineError: On all other ranks, if a block that went first raised; they do not run theirs.

        Example:
            `with job.main_first(): dataset = MNIST("data", download=True)`
        """
        hosts = list(self.comm.hosts) if local else [""] * self.comm.size
        if hosts.index(hosts[self.comm.rank]) != self.comm.rank:
            self._hear_of_firsts("")
            yield
            return
        try:
            yield
        except BaseException as error:
            self._hear_of_firsts(f"{type(error).__name__}: {error}", raises=False)
            raise
        self._hear_of_firsts("")

    def _hear_of_firsts(self, own_failure: str, *, raises: bool = True) -> None:
        with self.turns.meeting():
            told = exchange.gather_objects([_FIRST, own_failure], self.comm)
        others = [r for r, one in enumerate(told) if not (isinstance(one, list) and _FIRST in one)]
        if others:
            raise Mismatch(
                f"rank {self.comm.rank}: job.main_first: {named(others)} made another call, which"
                " all ranks have to make together: take it out of the block"
            )
        told = [failure for _, failure in told]
        failed = [rank for rank, failure in enumerate(told) if failure]
        if failed and raises:
            raise PacelineError(
                f"rank {self.comm.rank}: the block of job.main_first failed on {named(failed)}, which ran it"
                f" first: {told[failed[0]]}. Nothing was run here"
            )

    def set_seed(self, seed: int) -> None:
        """Seed torch, NumPy and `random`, as `paceline.init(seed=)` does; all ranks call it.

        Before the first `prepare` all ranks draw the same numbers, and `prepare` gives each a stream of its
        own; after it, each has its own at once, and rank 0 has `seed` itself. Loaders that are prepared later
        order their samples by it; those that there are keep their order.

        Args:
            seed: At least 0, the same on all ranks.

        Raises:
            ConfigError: It is no whole number of at least 0.
        """
        self._seed = seed = whole_number("job.set_seed: seed", seed, least=0)
        self.loaders.seed = seed
        random_state.seed_worker(seed, self.comm.rank if self._has_prepared else 0)
