"""Accumulation around a whole loop body: in the middle of a window, steps and zero_grad take no effect."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from paceline.errors import ConfigError
from paceline.train.arguments import unwrapped
from paceline.train.attachment import Attachment
from paceline.train.data.following import Loaders

_MARK = "_paceline_holds_back"


class AccumulatingCalls:
    """`job.accumulate` and what belongs to it."""

    attachments: list[Attachment]
    registered: dict[str, Any]
    loaders: Loaders
    _of_block: list[Attachment]

    @contextmanager
    def accumulate(self, *models: nn.Module) -> Iterator[None]:
        """The loop body of a micro-batch; each `accumulation_steps`-th ends a window, as does the last batch.

        The number is that of `prepare(..., accumulation_steps=)`. In blocks that do not end a window,
        backward only accumulates, and `step` of the models' optimizers, their schedulers and GradScalers does
        nothing, if `prepare` (or `register`) was given them. `zero_grad` of those optimizers does nothing
        while gradients wait for the end of their window, so it may stand at the beginning of the block or at
        its end. What else belongs to an update, such as clipping, goes below `if job.sync_gradients:`.

        A block counts as one micro-batch however many backward passes it has; each micro-batch has its own
        weight. `job.backward` divides the loss by `accumulation_steps`, `loss.backward()` does not. A short
        last window is divided by the same number, so its gradient is smaller, as in one process. Where no
        prepared loader says which batch is the last, windows are full ones. A loop that is left amid a window
        continues that window in the next pass.

        Args:
            models: Prepared models that are trained inside; default: all.

        Raises:
            ConfigError: A model that was not prepared; models with different accumulation_steps; a block in
                a block of the same model; gradients that were changed, or a `step` with a closure, or of an
                optimizer that `prepare` does not know, in the middle of a window.

        Example:
            ```
            for x, y in loader:
                with job.accumulate(model):
                    job.backward(loss_fn(model(x), y))
                    optimizer.step()
                    scheduler.step()
                    optimizer.zero_grad()
            ```
        """
        self.loaders.check_open("job.accumulate: the job")
        chosen = self._of_block = self._chosen(models)
        with ExitStack() as stack:
            for attachment in chosen:
                stack.enter_context(attachment.block())
            _check_alike([a for a in self.attachments if a.is_in_block])
            self._hold(chosen, stack)
            yield

    @property
    def sync_gradients(self) -> bool:
        """Whether this block of `accumulate`, or the one before, ends the window of its models.

        In loops that accumulate without such blocks: whether no gradients of any model wait for more
        backward passes. Always True without windows.
        """
        of_block = [one for one in self.attachments if one in self._of_block]
        return all(attachment.ends_window for attachment in of_block or self.attachments)

    def backward(self, loss: torch.Tensor, **keywords: Any) -> None:
        """`loss.backward()`; inside `job.accumulate`, of the loss divided by `accumulation_steps`.

        A loss that was declared a sum (`prepare(..., loss_reduction="sum")`) is not divided. The loss scale
        of `precision="fp16"` is inside the model, also for plain `loss.backward()`; a GradScaler of your own
        scales the loss before: `job.backward(scaler.scale(loss))`.

        Args:
            loss: What is to be differentiated.
            keywords: As for `torch.Tensor.backward`: `retain_graph`, `create_graph`, `gradient`, `inputs`.
        """
        self.loaders.check_open("job.backward: the job")
        inside = [a for a in self.attachments if a.is_in_block and not a.weights.is_sum]
        if inside and inside[0].accumulation_steps > 1:
            loss = loss / inside[0].accumulation_steps
        loss.backward(**keywords)  # type: ignore[no-untyped-call]

    def _chosen(self, models: Sequence[nn.Module]) -> list[Attachment]:
        if not models:
            return list(self.attachments)
        plain = [unwrapped(model) for model in models]
        chosen = [a for a in self.attachments if any(a.module is model for model in plain)]
        if len(chosen) < len(plain):
            known = [a.module for a in self.attachments]
            names = ", ".join(type(m).__name__ for m in plain if not any(m is one for one in known))
            raise ConfigError(
                f"job.accumulate({names or 'one model twice'}): prepared models expected, each once; call"
                " job.prepare(model, optimizer, loader, accumulation_steps=…) first"
            )
        return chosen

    def _hold(self, chosen: Sequence[Attachment], stack: ExitStack) -> None:
        """Replace, while the block runs, what must have no effect in the middle of a window."""
        optimizers: dict[int, Any] = {}
        waiting: dict[int, list[Attachment]] = {}
        for attachment in chosen:
            for one in attachment.replica.optimizers:
                optimizers[id(one)] = one
                waiting.setdefault(id(one), []).append(attachment)
        for key, one in optimizers.items():
            stack.enter_context(_zero_grad_waits(one, waiting[key]))
            if any(a.holds_back for a in waiting[key]):
                stack.enter_context(_replaced(one, "step", _step_waits))
        if any(a.holds_back for a in chosen):
            for thing in _steppers(self.registered, list(optimizers.values())):
                for name in ("step", "update", "unscale_"):
                    if callable(getattr(thing, name, None)):
                        stack.enter_context(_replaced(thing, name, _nothing))
                stack.enter_context(_replaced(thing, "state_dict", _state_without_replacements(thing)))


def _check_alike(inside: Sequence[Attachment]) -> None:
    if len({(a.accumulation_steps, a.weights.is_sum) for a in inside}) > 1:
        told = ", ".join(f"{type(a.module).__name__}: {a.accumulation_steps}" for a in inside)
        raise ConfigError(
            f"job.accumulate: models of one block need the same accumulation_steps and loss_reduction, got"
            f" {told}; prepare them alike, or use one block after the other"
        )


def _steppers(registered: Mapping[str, Any], optimizers: Sequence[Any]) -> list[Any]:
    """Schedulers of these optimizers, and GradScalers."""
    groups = {id(one.param_groups[0]) for one in optimizers if one.param_groups}
    found = []
    for thing in registered.values():
        own = getattr(getattr(thing, "optimizer", None), "param_groups", None)
        is_scheduler = callable(getattr(thing, "step", None)) and own and id(own[0]) in groups
        if is_scheduler or isinstance(thing, torch.amp.GradScaler):
            found.append(thing)
    return found


def _state_without_replacements(thing: Any) -> Callable[[], dict[str, Any]]:
    """Schedulers save all their attributes."""
    own = thing.state_dict
    return lambda: {key: value for key, value in own().items() if not hasattr(value, _MARK)}


@contextmanager
def _zero_grad_waits(thing: Any, attachments: Sequence[Attachment]) -> Iterator[None]:
    """`thing.zero_grad` does nothing while gradients of the window are accumulated and not reduced."""
    own = thing.zero_grad

    def zero_grad(*arguments: Any, **keywords: Any) -> Any:
        if any(a.waiting_backwards for a in attachments):
            return None
        return own(*arguments, **keywords)

    with _replaced(thing, "zero_grad", zero_grad):
        yield


@contextmanager
def _replaced(thing: Any, name: str, by: Callable[..., Any]) -> Iterator[None]:
    """On the instance: its class stays as it is."""
    before = vars(thing).get(name)

    @functools.wraps(getattr(thing, name))  # with the mark that schedulers put on `step`
    def replacement(*arguments: Any, **keywords: Any) -> Any:
        return by(*arguments, **keywords)

    setattr(replacement, _MARK, True)
    setattr(thing, name, replacement)
    try:
        yield
    finally:
        delattr(thing, name)
        if before is not None:
            setattr(thing, name, before)


def _nothing(*arguments: Any, **keywords: Any) -> None:
    """Held back: the window is not at its end."""


def _step_waits(closure: Callable[[], Any] | None = None, **keywords: Any) -> None:
    if closure is not None:
        raise ConfigError(
            "optimizer.step(closure) in job.accumulate: the closure makes backward passes of its own, which"
            " the middle of a window would leave out; accumulate inside the closure, without job.accumulate"
        )
