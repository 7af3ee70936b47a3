"""Between the user's loop and a strategy: hooks on parameters, on the autograd engine and on optimizers.

Gradients are complete at the end of backward: the first parameter hook of a backward queues a callback that
the engine runs when the last gradient is there. What lies between backward and step (unscale_, clipping)
therefore sees final gradients, and the optimizer needs no wrapper.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Protocol

import torch
from torch import nn
from torch.autograd import Variable

from paceline import _core
from paceline.errors import ConfigError
from paceline.strategies.base.strategy import TrainingStrategy
from paceline.train.minibatch import AccumulationWindow, MinibatchEvent, MinibatchState, Phase
from paceline.train.replica import FlatReplica, GradientBucket
from paceline.types import Communicator

_LARGE_NUMEL = 1 << 18  # a megabyte: the copy would only push out of the caches what backward needs next


class Removable(Protocol):
    """What registering a hook returns."""

    def remove(self) -> None: ...


class Attachment:
    """One prepared model: its replica, its strategy, and the state of the minibatch in progress."""

    def __init__(
        self,
        replica: FlatReplica,
        strategy: TrainingStrategy,
        comm: Communicator,
        *,
        accumulation_steps: int,
    ) -> None:
        self.replica = replica
        self.strategy = strategy
        self.accumulation_steps = accumulation_steps
        self.minibatches = 0
        """Minibatches (accumulation windows) finished."""
        self.has_loader = False
        self.on_update: Callable[[], None] | None = None
        """Called after each minibatch's update."""
        self.on_gradients: Callable[[], None] | None = None
        """Called when all gradients are complete, at the end of backward."""
        self._size = comm.size
        self.comm = comm
        self._minibatch = MinibatchState()
        self._window = AccumulationWindow()
        self._only_accumulates = False  # inside `no_sync`
        self._sends = False  # whether the backward pass that runs reduces its gradients
        self._taken: set[int] = set()  # parameters whose gradients are in their buckets
        self._next_bucket = 0
        self._stepped: set[int] = set()  # optimizers that have stepped in this minibatch
        self._has_warned = False
        self._handles: list[Removable] = []
        self._counts = {
            id(o): sum(len(group["params"]) for group in o.param_groups) for o in replica.optimizers
        }
        self._hook()

    # The data's side.

    def batch_begins(self, own_samples: int, all_samples: int, is_last: bool) -> None:
        """The loader hands out a batch: what came before is over, and this is the new batch's weight."""
        self.finish_minibatch()
        self._minibatch.backward_was_abandoned()
        window = self._window
        window.add(own_samples, all_samples, is_last=is_last)
        self.replica.weight = window.own_samples / window.all_samples
        self.replica.has_samples = window.own_samples > 0

    def data_ends(self) -> None:
        """The epoch's data is used up; a loop without the loader weighs all ranks alike."""
        self.finish_minibatch()
        self._window.clear()
        self.replica.weight, self.replica.has_samples = 1.0 / self._size, True

    @property
    def is_mid_window(self) -> bool:
        """Whether gradients wait for more backward passes or for the optimizer."""
        return self._window.backwards > 0

    def finish_minibatch(self) -> None:
        """Close a minibatch whose optimizer steps did not all come (a GradScaler skipped them)."""
        if not self._minibatch.awaits_step:
            return
        has_stepped = bool(self._stepped)
        self._end_minibatch()
        if has_stepped:
            self.strategy.after_update()
        else:
            self.strategy.update_skipped()

    def _end_minibatch(self) -> None:
        self._stepped.clear()
        self._minibatch.awaits_step = False
        self._minibatch.advance(MinibatchEvent.MINIBATCH_ENDS)
        self.minibatches += 1

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes inside only accumulate; the next one outside sends the sum."""
        before, self._only_accumulates = self._only_accumulates, True
        try:
            yield
        finally:
            self._only_accumulates = before

    def keep(self, handle: Removable) -> None:
        """Call `handle.remove()` when this is detached."""
        self._handles.append(handle)

    def detach(self) -> None:
        """Take all hooks off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    # Hooks.

    def _hook(self) -> None:
        for index, parameter in enumerate(self.replica.trained):
            hook = self._gradient_hook(index)
            self._handles.append(parameter.register_post_accumulate_grad_hook(hook))  # type: ignore[no-untyped-call]
        for optimizer in self.replica.optimizers:
            self._handles.append(optimizer.register_step_pre_hook(self._before_step))
            self._handles.append(optimizer.register_step_post_hook(self._after_step))
        self._handles.append(self.replica.module.register_forward_pre_hook(self._before_forward))

    def _before_forward(self, module: nn.Module, arguments: object) -> None:
        if (
            self._minibatch.awaits_step
            and not self.has_loader
            and torch.is_grad_enabled()
            and module.training
        ):
            self.finish_minibatch()

    def _gradient_hook(self, index: int) -> Callable[[torch.Tensor], None]:
        lays_flat = self.strategy.needs_gradients and self._size > 1
        minibatch = self._minibatch

        def hook(parameter: torch.Tensor) -> None:
            if minibatch.phase is not Phase.BACKWARD:
                self._begin_backward()
            if lays_flat and self._sends:
                if index in self._taken:
                    raise ConfigError(
                        f"the gradient of {self.replica.name(parameter)} arrived twice in one backward; use"
                        " checkpoint(..., use_reentrant=False), or run backward under job.no_sync()"
                    )
                self._taken.add(index)
                self._take_gradient(index, parameter)
                bucket = self.replica.bucket_of[index]
                bucket.missing -= 1
                if bucket.missing == 0:
                    self._send_full_buckets()

        return hook

    def _begin_backward(self) -> None:
        self._minibatch.advance(MinibatchEvent.BACKWARD_BEGINS)
        self._window.backwards += 1
        self.comm.charge_compute()
        self._sends = not self._only_accumulates and (
            self._window.backwards >= self.accumulation_steps
            or (self._window.is_last_batch and self.has_loader)
        )
        self._reset_buckets()
        # torch's own way to learn of the end of a backward pass; DDP uses it too.
        Variable._execution_engine.queue_callback(self._end_backward)  # noqa: SLF001

    def _reset_buckets(self) -> None:
        self._taken.clear()
        self._next_bucket = 0
        for bucket in self.replica.buckets:
            bucket.missing = len(bucket.members)

    def _end_backward(self) -> None:
        if self._minibatch.phase is not Phase.BACKWARD:
            return  # it raised, and the loop has gone on to another batch
        if not self._sends:
            self._minibatch.advance(MinibatchEvent.GRADIENTS_KEPT)
            return
        self._complete()

    def _complete(self) -> None:
        """Send what was not sent during backward, wait, and give unused gradients back as None."""
        self._window.backwards = 0
        self._minibatch.advance(MinibatchEvent.GRADIENTS_REDUCED)
        self._minibatch.awaits_step = bool(self.replica.optimizers)
        if not self.replica.optimizers:
            self._minibatch.advance(MinibatchEvent.MINIBATCH_ENDS)
        if self.replica.buckets and self._size > 1:
            for bucket in self.replica.buckets[self._next_bucket :]:
                self._fill(bucket)
                self._send(bucket)
        self.strategy.backward_done()
        if self.replica.buckets and self._size > 1:
            self._return_unused()
        if self.on_gradients is not None:
            self.on_gradients()

    def _send_full_buckets(self) -> None:
        buckets = self.replica.buckets
        while self._next_bucket < len(buckets) and buckets[self._next_bucket].missing == 0:
            self._send(buckets[self._next_bucket])

    def _send(self, bucket: GradientBucket) -> None:
        self._next_bucket = bucket.index + 1
        if self._next_bucket == len(self.replica.buckets):
            self._flag_used()
        self.strategy.gradient_ready(bucket)

    def _flag_used(self) -> None:
        used = self.replica.used
        assert used is not None
        weight = self.replica.weight
        flags = [0.0 if p.grad is None else weight for p in self.replica.trained]
        if all(flags):
            used.fill_(weight)
        else:
            used.copy_(torch.tensor(flags, dtype=used.dtype))

    def _take_gradient(self, index: int, parameter: torch.Tensor) -> None:
        """Move a gradient into its place in the flat buffer, times this rank's weight."""
        view, gradient, weight = self.replica.gradient_views[index], parameter.grad, self.replica.weight
        if gradient is None or weight == 0.0:
            view.zero_()  # not 0 · gradient: a repeated batch may have given NaN
        elif gradient is view:
            view.mul_(weight)
        elif gradient.layout is not torch.strided:
            raise ConfigError(
                f"the gradient of {self.replica.name(parameter)} is sparse ({gradient.layout}), which the"
                " all_reduce of dense buckets cannot send; use sparse=False, or strategy='local_sgd(...)'"
            )
        else:
            _scale(view, gradient, weight)
        if gradient is not None:
            parameter.grad = view

    def _fill(self, bucket: GradientBucket) -> None:
        with torch.no_grad():
            for index in bucket.members:
                if index not in self._taken:
                    self._take_gradient(index, self.replica.trained[index])

    def _return_unused(self) -> None:
        used = self.replica.used
        assert used is not None
        if bool((used > 0).all()):
            for parameter, view in zip(self.replica.trained, self.replica.gradient_views, strict=True):
                if parameter.grad is not view:
                    parameter.grad = view
            return
        for parameter, view, flag in zip(
            self.replica.trained, self.replica.gradient_views, used.tolist(), strict=True
        ):
            parameter.grad = view if flag > 0 else None

    def _before_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        self._check_parameters(optimizer)
        if self._minibatch.phase is Phase.UNSENT:  # fewer passes than declared: reduce now, after clipping
            if not self._has_warned and self.comm.rank == 0 and self.strategy.needs_gradients:
                warnings.warn(
                    f"optimizer.step() after {self._window.backwards} of {self.accumulation_steps}"
                    " accumulation steps: gradients are reduced now, after any clipping or unscaling",
                    stacklevel=3,
                )
            self._has_warned = True
            self._reset_buckets()
            self._complete()
        if not self._stepped:
            self.strategy.before_update()

    def _after_step(self, optimizer: torch.optim.Optimizer, *_: object) -> None:
        self._stepped.add(id(optimizer))
        if len(self._stepped) == len(self.replica.optimizers):
            self._end_minibatch()
            self.strategy.after_update()
            if self.on_update is not None and not self.has_loader:
                self.on_update()

    def _check_parameters(self, optimizer: torch.optim.Optimizer) -> None:
        count = sum(len(group["params"]) for group in optimizer.param_groups)
        if count == self._counts[id(optimizer)] and not any(p.requires_grad for p in self.replica.frozen):
            return
        raise ConfigError(
            f"rank {self.comm.rank}: the optimizer holds {count} parameters, {self._counts[id(optimizer)]}"
            " when prepare() saw it, or a frozen parameter was unfrozen; their gradients would stay local."
            " Call job.prepare(model, optimizer, ...) again after adding or unfreezing parameters"
        )


def _scale(view: torch.Tensor, gradient: torch.Tensor, weight: float) -> None:
    """`view` = `gradient` · `weight`; both are dense."""
    is_plain = gradient.dtype is torch.float32 and gradient.is_cpu and gradient.stride() == view.stride()
    if is_plain and view.dtype is torch.float32 and gradient.numel() >= _LARGE_NUMEL:
        _core.scale(view.data_ptr(), gradient.data_ptr(), gradient.numel(), weight)
    else:
        torch.mul(gradient, weight, out=view)
