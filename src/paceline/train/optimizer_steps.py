"""Steps of optimizers, seen wherever the optimizer was made: before `prepare`, after it, or inside another.

torch calls the hooks below for every optimizer of the process. What steps a prepared model's parameters is
either known, or found now, or refused: a step that nobody sees would train one replica alone.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from paceline.errors import CheckpointError, ConfigError
from paceline.train.replica import FlatReplica

Optimizer = torch.optim.Optimizer
Callback = Callable[[Optimizer], None]

INSIDE_BACKWARD = (
    "inside backward, where gradients are not reduced yet; step after backward, or choose a strategy that"
    " averages models, such as local_sgd(period=1)"
)
AMID_WINDOW = (
    "in the middle of a window of job.accumulate, by an optimizer that prepare() was not given and that is"
    " not held back therefore; give the one that the loop steps: job.prepare(model, optimizer, loader)"
)
OTHER_ORDER = (
    "of a model whose minibatch the other ranks have ended before this step: step the models in the same"
    " order on all ranks, and give them to prepare() in that order"
)
"""Why a step is refused."""

_lock = threading.Lock()
_all: tuple[OptimizerSteps, ...] = ()  # replaced, never changed: steps of other threads go through it
_is_hooked = False


class OptimizerSteps:
    """The optimizers of one prepared model.

    Args:
        replica: The model; an optimizer that is found is added to `replica.optimizers`.
        who: This rank, for errors.
        before: Called before the first of nested steps of one optimizer.
        after: Called after it.
        mean: Makes the global loss of this rank's loss, for optimizers that decide by it; None where ranks
            step by themselves.
    """

    def __init__(
        self,
        replica: FlatReplica,
        *,
        who: str,
        before: Callback,
        after: Callback,
        mean: Callable[[Any], Any] | None = None,
    ) -> None:
        self._replica, self._who = replica, who
        self._before, self._after, self._mean = before, after, mean
        self._trained = {id(p) for p in replica.trained}
        self._checked: dict[int, list[int]] = {}  # optimizer → its parameters when they were last checked
        self._depth: dict[int, int] = {}  # a subclass may call its parent's step, which is hooked as well
        self._aliases: dict[int, Optimizer] = {}
        self._foreign: weakref.WeakKeyDictionary[Optimizer, int] = weakref.WeakKeyDictionary()
        for optimizer in replica.optimizers:
            self._checked[id(optimizer)] = _parameter_ids(optimizer)
        _add(self)

    def remove(self) -> None:
        """Look no more."""
        global _all  # noqa: PLW0603  one list per process, as torch has one list of hooks
        with _lock:
            _all = tuple(one for one in _all if one is not self)

    def forget_unfinished(self) -> None:
        """A step that raised never ends; a new minibatch begins without it."""
        self._depth.clear()

    def begins(self, optimizer: Optimizer) -> None:
        """Some optimizer of this process is about to step."""
        own = self._own(optimizer)
        if own is None:
            return
        depth = self._depth.get(id(own), 0)
        self._depth[id(own)] = depth + 1
        if depth == 0:
            self._check(own)
            self._before(own)

    def closure(self, optimizer: Optimizer, closure: Callable[[], Any]) -> Callable[[], Any]:
        """The closure that `optimizer` is to call instead of the user's."""
        mean = self._mean
        if mean is None or id(optimizer) not in self._checked:
            return closure
        return lambda: mean(closure())

    def ended(self, optimizer: Optimizer) -> None:
        """It has stepped."""
        own = self._aliases.get(id(optimizer), optimizer)
        depth = self._depth.get(id(own), 0)
        if depth > 1:
            self._depth[id(own)] = depth - 1
        elif depth == 1:
            del self._depth[id(own)]
            self._after(own)

    def _own(self, optimizer: Optimizer) -> Optimizer | None:
        """The known optimizer that this step counts for; None if it is no step of this model's."""
        if id(optimizer) in self._checked:
            return optimizer
        if id(optimizer) in self._aliases:
            return self._aliases[id(optimizer)]
        if self._depth:
            return None  # inside a known one, which wraps it
        num_groups = len(optimizer.param_groups)
        if self._foreign.get(optimizer) == num_groups:
            return None
        if not any(id(p) in self._trained for group in optimizer.param_groups for p in group["params"]):
            self._refuse_strangers(optimizer)
            self._foreign[optimizer] = num_groups
            return None
        return self._find(optimizer)

    def _find(self, optimizer: Optimizer) -> Optimizer:
        for known in self._replica.optimizers:
            if known.param_groups and known.param_groups[0] is optimizer.param_groups[0]:
                self._aliases[id(optimizer)] = known  # what a wrapper such as SAM steps by itself
                return known
        if self._replica.optimizers:
            raise ConfigError(
                f"{self._who}: a {type(optimizer).__name__} that prepare() was not given steps parameters of"
                " a prepared model, so the replicas would drift apart; give all of the model's optimizers:"
                " job.prepare(model, [first, second], loader). If it replaces another, prepare again:"
                " job.prepare(model, optimizer)"
            )
        self._replica.optimizers.append(optimizer)
        if self._replica.late_states:
            name, state = self._replica.late_states.pop(0)
            check_classes([name], [optimizer])
            optimizer.load_state_dict(state)
        self._checked[id(optimizer)] = []
        return optimizer

    def _refuse_strangers(self, optimizer: Optimizer) -> None:
        """It knows no parameter that `prepare` saw: none of the model's own either?"""
        stepped = set(_parameter_ids(optimizer))
        new = [n for n, p in self._replica.module.named_parameters() if id(p) in stepped and p.requires_grad]
        if new:
            raise self._unseen(optimizer, new)

    def _unseen(self, optimizer: Optimizer, names: list[str]) -> ConfigError:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        return ConfigError(
            f"{self._who}: {type(optimizer).__name__} steps what prepare() did not see: {names[0]}{more}"
            " (added, replaced or unfrozen); the gradients would stay local. Call"
            " job.prepare(model, optimizer, ...) again after such a change"
        )

    def _check(self, optimizer: Optimizer) -> None:
        """Every parameter that it steps must be one that `prepare` saw."""
        now = _parameter_ids(optimizer)
        if now == self._checked[id(optimizer)] and not any(p.requires_grad for p in self._replica.frozen):
            return
        strangers = [
            p
            for group in optimizer.param_groups
            for p in group["params"]
            if p.requires_grad and not any(id(p) in one._trained for one in _all)  # noqa: SLF001  its own class
        ]
        unfrozen = [p for p in self._replica.frozen if p.requires_grad]
        if strangers or unfrozen:
            raise self._unseen(optimizer, [self._replica.name(p) for p in [*strangers, *unfrozen]])
        self._checked[id(optimizer)] = now


def stateful(optimizer: Optimizer) -> Optimizer:
    """The optimizer itself; the one inside it, if it is a wrapper that left out Optimizer's constructor."""
    if hasattr(optimizer, "_optimizer_state_dict_pre_hooks"):
        return optimizer
    inner = [one for one in vars(optimizer).values() if isinstance(one, Optimizer)]
    return stateful(inner[0]) if inner else optimizer


def classes(optimizers: Sequence[Optimizer]) -> list[str]:
    """The names of their classes, without wrappers."""
    return [type(stateful(one)).__name__ for one in optimizers]


def check_classes(saved: Sequence[str], optimizers: Sequence[Optimizer]) -> None:
    """CheckpointError unless they are of the classes that were saved; torch would load any state."""
    here = classes(optimizers)
    if here != list(saved):
        raise CheckpointError(
            f"the checkpoint was saved with the optimizers {', '.join(saved) or 'none'}, this job has"
            f" {', '.join(here)}: make what it was saved with. To go on with another optimizer, load the"
            " weights alone, before prepare: model.load_state_dict(...) of job.save_model"
        )


def _parameter_ids(optimizer: Optimizer) -> list[int]:
    return [id(p) for group in optimizer.param_groups for p in group["params"]]


def _add(one: OptimizerSteps) -> None:
    global _all, _is_hooked  # noqa: PLW0603  see `remove`
    with _lock:
        _all = (*_all, one)
        if not _is_hooked:
            register_optimizer_step_pre_hook(_step_begins)
            register_optimizer_step_post_hook(_step_ended)
            _is_hooked = True


def _step_begins(
    optimizer: Optimizer, arguments: tuple[Any, ...], named: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    for one in _all:
        one.begins(optimizer)
    if not isinstance(optimizer, torch.optim.LBFGS):
        return None
    # It stops, and searches along a line, by the losses: on all ranks by the same ones.
    closure: Any = named.get("closure", arguments[1] if len(arguments) > 1 else None)
    for one in _all:
        closure = one.closure(optimizer, closure)
    return arguments[:1], {**named, "closure": closure}


def _step_ended(optimizer: Optimizer, arguments: Sequence[Any], named: dict[str, Any]) -> None:
    for one in _all:
        one.ended(optimizer)
