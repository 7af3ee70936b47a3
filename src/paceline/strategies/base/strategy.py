"""The abstract base of every training method, and how a spec string becomes one."""

from __future__ import annotations

import abc
from collections.abc import Callable
from typing import Any, ClassVar

import torch

from paceline import registry, spec
from paceline.types import Bucket, Communicator, Replica

PACKAGE = "paceline.strategies"


class TrainingStrategy(abc.ABC):
    """One training method: what travels, when, and how it is applied.

    The training loop's hooks call it in this order, for every minibatch:

        gradient_ready(bucket)*   during backward, buckets in the same order on every rank
        backward_done()           at the end of the backward that closes the minibatch
        before_update()           before the (first) optimizer steps
        after_update()            after the last optimizer stepped
        update_skipped()          instead of the two above, when a GradScaler skipped the step on this rank

    A strategy reaches other ranks and the clock through `comm` alone, so that it also runs in virtual time.
    With one rank it must send nothing. Errors of the communicator (PeerLost, Timeout …) pass through every
    method; strategies that set `survives_loss` handle PeerLost themselves.

    This class is the seam between `train` and the methods: a new method is a file in `paceline/strategies`
    with one concrete subclass. Its constructor's keyword arguments are those of the strategy string, and the
    class docstring describes each of them.
    """

    advice: ClassVar[str]
    """One line for `paceline strategies`: when to choose this method."""
    needs_gradients: bool = False
    """Whether gradients are laid out flat and `gradient_ready` is called. In `bucket.gradient` they are
    already multiplied by `replica.weight`, this rank's share of the minibatch's samples: their *sum* over
    ranks is the gradient of the mean loss. Flags that say which parameters were used follow in the last
    bucket; they must be summed too (`bucket.used_flags`)."""
    replicas_differ: ClassVar[bool] = False
    """Whether ranks hold different parameters between updates (then every rank saves its own)."""
    survives_loss: ClassVar[bool] = False
    """Whether the others can train on when a worker dies, on fabrics that can."""
    max_workers: ClassVar[int | None] = None
    """Largest number of workers, None without a limit; `prepare` refuses more."""
    bucket_bytes: int = 25 << 20
    """Gradient buckets are closed at this size (the first at 1 MiB, so that sending starts early)."""

    takes_turns: bool = False
    """Whether it exchanges the model with all ranks outside of backward: `await_turn` goes before."""
    finishes_unevenly: ClassVar[bool] = False
    """Whether `join` takes part in an exchange of ranks that still train."""

    scope: str = "0"
    """Set before `attach`: which of the job's models this is."""
    agree: Callable[[bool], None] | None = None
    """Set before `attach` by a job, which may have other models; see `await_turn`."""

    @property
    def name(self) -> str:
        """The name of the method: its file's."""
        return type(self).__module__.rsplit(".", 1)[-1]

    @property
    def channel(self) -> str:
        """The name of this method's message channel, which the job's other models do not use."""
        return f"{self.name}/{self.scope}"

    def await_turn(self, *, is_finishing: bool = False) -> None:
        """Return when all ranks exchange this model next.

        Args:
            is_finishing: This rank trains no more, in `synchronize`.
        """
        if self.agree is not None:
            self.agree(is_finishing)

    def join(self) -> None:
        """In `synchronize` of another model: take part in an exchange, without `await_turn`."""
        raise NotImplementedError

    def attach(self, replica: Replica, comm: Communicator) -> None:
        """Meet the model. Called once, by all ranks, before the first minibatch.

        Args:
            replica: This rank's model; all ranks have equal parameters now. Its flat buffers stay the same
                objects for the whole run: strategies change them in place.
            comm: The ranks that train together. Handlers for messages are registered here.

        Raises:
            ConfigError: The method does not fit this model or number of ranks.
        """
        self.replica = replica
        self.comm = comm

    def fit(self, num_steps: int, num_workers: int, batch_size: int = 0) -> str:
        """Learn how long the run is, and set arguments that were left to their defaults accordingly.

        `job.epochs` calls this on all ranks alike, before the first minibatch; comparisons also call it
        without training. A loop that does not use `job.epochs` never does: defaults must then stand alone.

        Args:
            num_steps: Minibatches of the whole run, on every worker.
            num_workers: Number of ranks that train.
            batch_size: Samples in a minibatch of one worker; 0 if that is not known.

        Returns:
            What does not suit such a run and which number to change, as one sentence; "" if nothing is wrong.
        """
        return ""

    def gradient_ready(self, bucket: Bucket) -> None:  # noqa: B027  optional hooks have empty bodies
        """`bucket.gradient` is complete on this rank. Must not wait for other ranks."""

    def backward_done(self) -> None:  # noqa: B027
        """All gradients of this minibatch are complete on this rank; on return they are what step uses."""

    def before_update(self) -> None:  # noqa: B027
        """The optimizer is about to step."""

    def after_update(self) -> None:  # noqa: B027
        """The optimizer (the last one, if there are several) has stepped."""

    def update_skipped(self) -> None:  # noqa: B027
        """The minibatch ended without an optimizer step on this rank."""

    def rest(self) -> None:  # noqa: B027
        """This rank is about to wait in a barrier, outside of this method: delay no other rank."""

    def synchronize(self) -> None:  # noqa: B027
        """Drain: afterwards every replica holds the final model, bit for bit. All ranks call it."""

    def consensus(self) -> list[torch.Tensor] | None:
        """Return the model to evaluate or save, without changing the replica. All ranks call it.

        Flat tensors like `replica.parameters`, not sharing memory with them; None means the parameters
        themselves.
        """
        return None

    def stats(self) -> dict[str, Any]:
        """Plain values for `job.stats()`: what this method measures about itself."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What a continued run needs on this rank: tensors and plain values only."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:  # noqa: B027
        """Continue from what `state_dict()` returned, after `attach`, on as many ranks."""

    @abc.abstractmethod
    def traffic(self, model_bytes: int, size: int) -> float:
        """Claim: payload bytes that a rank hands to its communicator per minibatch, mean over a long run.

        Args:
            model_bytes: Size of the flat parameter buffers, `job.stats()["model_bytes"]`.
            size: Number of ranks.

        Flags and counters of a few bytes per parameter tensor are left out. A test holds the claim against
        the communicator's byte ledger.
        """


def make(text: str | TrainingStrategy) -> TrainingStrategy:
    """Make the strategy that a string such as `local_sgd(period=16)` names; a strategy is returned as it is.

    Raises:
        ConfigError: There is no such strategy (the error lists those that exist), or it does not take these
            arguments (the error lists what it takes).
    """
    if isinstance(text, TrainingStrategy):
        return text
    parsed = spec.parse(text)
    made: TrainingStrategy = spec.call(class_of(parsed.name), parsed, kind="strategy")
    return made


def class_of(name: str) -> type[TrainingStrategy]:
    """Return the class that the plug-in file `name` defines."""
    module = registry.load(PACKAGE, name, kind="strategy")
    return registry.find_class(module, TrainingStrategy)  # type: ignore[type-abstract]
