"""Between the user's loop and a strategy: hooks on parameters, on the autograd engine and on optimizers.

Gradients are complete at the end of backward: the first parameter hook of a backward queues a callback that
the engine runs when the last gradient is there. What lies between backward and step (unscale_, clipping)
therefore sees final gradients, and the optimizer needs no wrapper.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from torch.autograd import Variable

from paceline.errors import ConfigError
from paceline.strategies.base.strategy import TrainingStrategy
from paceline.train.data.forwards import ForwardPass, ForwardPasses
from paceline.train.data.handed_out import HandedBatch
from paceline.train.data.in_hand import BatchesInHand
from paceline.train.gradients import drift
from paceline.train.gradients.kept import CHANGED_AMID_WINDOW, KeptGradients, ReducedGradients
from paceline.train.gradients.later_hooks import LaterHooks
from paceline.train.gradients.laying import lay
from paceline.train.gradients.reduced import connect
from paceline.train.gradients.weights import GradientWeights
from paceline.train.minibatch import AccumulationWindow, MinibatchEvent, MinibatchState, Phase
from paceline.train.modules.hooks import ModuleHook, Removable
from paceline.train.optimizer_steps import AMID_WINDOW, INSIDE_BACKWARD, OTHER_ORDER, OptimizerSteps
from paceline.train.replica import FlatReplica, GradientBucket
from paceline.types import Communicator


class Attachment:
    """One prepared model: its replica, its strategy, and the state of the minibatch in progress."""

    def __init__(
        self,
        replica: FlatReplica,
        strategy: TrainingStrategy,
        comm: Communicator,
        *,
        accumulation_steps: int,
        loss_reduction: str = "mean",
    ) -> None:
        self.replica = replica
        self.module: nn.Module = replica.module
        self.strategy = strategy
        self.weights = GradientWeights(
            replica, comm, loss_reduction=loss_reduction, reduces=strategy.needs_gradients
        )
        self.minibatches = 0
        """Minibatches (accumulation windows) finished."""
        self.num_updates = 0
        """Steps of its optimizers."""
        self.has_loader = False
        self.wanted: str | TrainingStrategy = strategy
        """What its strategy was made from."""
        self.on_update: Callable[[], None] | None = None
        """Called after each minibatch's update."""
        self.hands: BatchesInHand | None = None
        self.on_gradients: Callable[[bool], None] | None = None
        """Called when all gradients are complete, at the end of backward."""
        self.num_backwards = 0
        """Backward passes begun."""
        self._ended_for_others_at: int | None = None  # how many there were
        self.comm = comm
        self._minibatch = MinibatchState()
        self._window = AccumulationWindow(accumulation_steps)
        self._pass: object = None  # of the batch in hand
        self._batch: HandedBatch | None = None  # whose weight the coming backward passes have
        self._has_new_batch = False  # since gradients were complete
        self._untold: Callable[[], None] | None = None  # the strategy does not know yet how a minibatch ended
        self._forwards = ForwardPasses(self._is_reached)
        self._only_accumulates = False  # inside `no_sync`
        self._sends = False  # whether the backward pass that runs reduces its gradients
        self._graphs: dict[int, torch.Tensor] = {}  # this rank's gradients that have a graph
        self._kept = KeptGradients()  # amid a window of `job.accumulate`
        self._reduced = ReducedGradients()
        self._taken: set[int] = set()  # parameters whose gradients are in their buckets
        self._next_bucket = 0
        self._stepped: set[int] = set()  # optimizers that have stepped in this minibatch
        self._has_warned = False
        self._handles: list[Removable] = []
        self._later_hooks = LaterHooks(replica, comm.rank)
        self._hook()

    # The data's side.

    def batch_begins(self, batch: HandedBatch) -> None:
        """The loop takes a batch: this is its weight."""
        self.finish_skipped()
        self._minibatch.backward_was_abandoned()
        self._steps.forget_unfinished()
        window = self._window
        if batch.one is not self._pass:
            self._pass = batch.one
            self._drop_cleared()
        window.add(batch.own, batch.every, is_last=batch.is_last)
        self.replica.has_samples = window.own_samples > 0
        self._batch, self._has_new_batch = batch, True
        self.weights.take(batch, is_alone=self._is_alone)

    def take_up(self, batch: HandedBatch, *, trains: bool = False) -> None:
        """The model gets, or a backward pass trains, a batch that perhaps began before another one did."""
        if batch is not self._batch:
            self._batch, self._has_new_batch = batch, True
            had_samples = self._minibatch.phase is not Phase.IDLE and self.replica.has_samples
            self.replica.has_samples = batch.own > 0 or had_samples
            self._window.is_last_batch = batch.is_last
            self.weights.take(batch, is_alone=self._is_alone)
        if trains:
            self.weights.trains(batch)

    def _is_reached(self, one: ForwardPass) -> None:
        """A gradient reaches the model's outputs: layers inside (SyncBatchNorm) need the weight at once."""
        if one.is_certain and len(one.batches) == 1:
            self.take_up(one.batches[0])

    def _drop_cleared(self) -> None:
        """A window of an earlier pass goes on in this one, unless its gradients were cleared in between."""
        if self._minibatch.phase is Phase.UNSENT and self._kept.are_cleared():
            self._minibatch.advance(MinibatchEvent.WINDOW_DROPPED)
            self._window.drop()
            self._kept.forget()

    def data_ends(self) -> None:
        """The epoch's data is used up; a loop without the loader weighs all ranks alike."""
        self.finish_skipped()
        self._window.clear()
        self.replica.has_samples = True
        self._batch = None
        self.weights.clear()

    @property
    def weighs_samples(self) -> bool:
        """Whether gradients are multiplied by this rank's share of the samples."""
        return self.weights.weighs_samples

    @property
    def is_told(self) -> bool:
        """Whether the loop itself said what the coming backward passes stand for."""
        return self.weights.is_told

    def weigh(self, own: float, every: float) -> None:
        """The coming backward passes stand for `own` of `every` samples or tokens of all ranks."""
        newest = -1 if self.hands is None else self.hands.newest
        self.weights.tell(own, every, newest=newest, is_alone=self._is_alone)

    @property
    def reduces_gradients(self) -> bool:
        """Whether all ranks wait for the sum of their gradients."""
        return self.strategy.needs_gradients and not self.strategy.survives_loss

    @property
    def _is_alone(self) -> bool:
        """Whether the next backward pass is reduced by itself."""
        return self.accumulation_steps == 1 and not self._only_accumulates and not self._window.backwards

    @property
    def accumulation_steps(self) -> int:
        """Backward passes, or blocks of `job.accumulate`, per update."""
        return self._window.steps

    @property
    def waiting_backwards(self) -> int:
        """Backward passes whose gradients are not reduced yet."""
        return self._window.backwards

    def check_steps(self) -> None:
        """Mismatch if ranks that sum their gradients took other steps or have drifted apart. Collective."""
        if self.reduces_gradients and self.comm.size > 1:
            self.replica.adopt()
            drift.check(self.num_updates, self.replica.optimizers, self.replica.parameters, self.comm)

    @property
    def is_in_block(self) -> bool:
        """Whether a block of `job.accumulate` runs."""
        return self._window.is_in_block

    @property
    def holds_back(self) -> bool:
        """Whether a block of `job.accumulate` runs that does not end its window."""
        return self.is_in_block and not self._window.closes

    @property
    def ends_window(self) -> bool:
        """Whether the block of `job.accumulate` that runs, or ran last, ends its window.

        In loops without such blocks: whether no gradients wait for more backward passes.
        """
        return not self.waiting_backwards if self._window.closes is None else self._window.closes

    def finish_skipped(self, arrived: nn.Parameter | None = None, *, meets: bool = False) -> None:
        """Close a minibatch of which some optimizers have stepped, or none, and the gradients were cleared.

        Others may still be stepped: the next batch may be fetched before, or trained in the same step.

        Args:
            arrived: The one whose next gradient has been added already.
            meets: Whether all ranks meet now: each is level with the others, also one that left out its steps
                for gradients that are not finite, or that has another batch in hand.
        """
        if not self._minibatch.awaits_step:
            return
        has_left_out = (
            meets and not self.reduces_gradients and (self._has_new_batch or not self._reduced.are_finite())
        )
        if has_left_out or self._stepped or self._reduced.are_cleared(arrived):
            self.finish_minibatch(is_late=arrived is not None)

    def _goes_on(self, arrived: nn.Parameter | None = None) -> None:
        """A forward or backward pass begins: the minibatch before it may be one whose steps did not come."""
        if self._minibatch.awaits_step and (
            # Without a batch of a loader: SAM moves the parameters before the second pass of a minibatch.
            not self._reduced.parameters_moved() if self._batch is None else self._has_new_batch
        ):
            self.finish_skipped(arrived)

    @property
    def awaits_step(self) -> bool:
        """Whether gradients are complete and not all optimizers have stepped."""
        return self._minibatch.awaits_step

    @property
    def told_minibatches(self) -> int:
        """Minibatches that the strategy knows to be finished."""
        return self.minibatches - int(self._untold is not None)

    @property
    def may_be_finished(self) -> bool:
        """Whether another minibatch can be finished now, if this rank has left out its steps."""
        return self.awaits_step or self._untold is not None

    def finish_for_others(self) -> None:
        """Close a minibatch that the other ranks have closed: this one has left out its steps."""
        untold, self._untold = self._untold, None
        if untold is not None:
            untold()
            return
        self._ended_for_others_at = self.num_backwards
        self.finish_minibatch()

    def finish_minibatch(self, *, is_late: bool = False) -> None:
        """Close a minibatch whose optimizer steps did not all come (a GradScaler skipped them).

        Args:
            is_late: Whether a backward pass runs, after which the strategy may change parameters.
        """
        if not self._minibatch.awaits_step:
            return
        tell = self.strategy.after_update if self._stepped else self.strategy.update_skipped
        self._end_minibatch()
        if is_late:
            self._untold = tell
        else:
            tell()

    def _end_minibatch(self) -> None:
        self._stepped.clear()
        self._minibatch.awaits_step = False
        self._minibatch.advance(MinibatchEvent.MINIBATCH_ENDS)
        self.minibatches += 1
        if not self.has_loader:
            self.weights.clear_spent()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes inside only accumulate; the next one outside sends the sum."""
        before, self._only_accumulates = self._only_accumulates, True
        self.weights.weigh(is_alone=False)
        try:
            yield
        finally:
            self._only_accumulates = before

    @contextmanager
    def block(self) -> Iterator[None]:
        """One micro-batch of `job.accumulate`; inside, gradients are reduced only if it ends the window.

        Raises:
            ConfigError: It is inside another one, or the loop changed gradients before the window's end.
        """
        if self.is_in_block:
            raise ConfigError(
                f"rank {self.comm.rank}: job.accumulate inside job.accumulate of the same model; one block is"
                " one micro-batch: leave out the inner one"
            )
        if self.hands is not None and self.accumulation_steps > 1:
            self._window.is_last_batch = self.hands.block(self, self._window.is_last_batch)
        self._window.block_begins(knows_last=self.has_loader)
        try:
            yield
            if self.holds_back:
                self._check_untouched()
        finally:
            self._window.block_ends()

    def _check_untouched(self, arrived: nn.Parameter | None = None) -> None:
        """Half a sum that was clipped, unscaled or dropped would not be that of one process.

        Args:
            arrived: The one whose next gradient has been added already.
        """
        if self._minibatch.phase is Phase.UNSENT and self._kept.are_changed(arrived):
            raise ConfigError(f"rank {self.comm.rank}: {CHANGED_AMID_WINDOW}")

    def cut_outputs(self) -> None:
        """Stop gradients at the model's outputs while this rank's own loss counts nothing."""
        hook = ModuleHook(self.weights.watch_outputs)
        self._handles.append(self.replica.module.register_forward_hook(hook))

    def complete(self) -> bool:
        """Reduce now what was accumulated in a window that is not full; whether there was anything."""
        if self._minibatch.phase is not Phase.UNSENT:
            return False
        self._reset_buckets()
        self._complete()
        return True

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
        self._steps = OptimizerSteps(
            self.replica,
            who=f"rank {self.comm.rank}",
            before=self._before_step,
            after=self._after_step,
            mean=self.weights.mean_loss if self.strategy.needs_gradients and self.comm.size > 1 else None,
        )
        self._handles += [self._steps, self.weights]
        hook = ModuleHook(self._before_forward)
        self._handles.append(self.replica.module.register_forward_pre_hook(hook, with_kwargs=True))
        hook = ModuleHook(self._forwards.watch_outputs)
        self._handles.append(self.replica.module.register_forward_hook(hook))

    def _before_forward(self, module: nn.Module, arguments: object, keywords: object) -> None:
        if self.hands is not None and not torch.compiler.is_compiling():
            self._forwards.begin(self.hands.given(self, (arguments, keywords)))
        if torch.is_grad_enabled() and (self.has_loader or module.training):
            self._goes_on()

    def _gradient_hook(self, index: int) -> Callable[[nn.Parameter], None]:
        lays_flat = self.strategy.needs_gradients and self.comm.size > 1
        minibatch, later = self._minibatch, self._later_hooks

        def hook(parameter: nn.Parameter) -> None:
            if minibatch.phase is not Phase.BACKWARD:
                self._check_untouched(parameter)
                self._goes_on(parameter)
                self._begin_backward()
            if lays_flat:
                later.check(parameter)
            if lays_flat and self._sends:
                if index in self._taken:
                    raise ConfigError(
                        f"the gradient of {self.replica.name(parameter)} arrived twice in one backward; use"
                        " checkpoint(..., use_reentrant=False), or run backward under job.no_sync()"
                    )
                self._taken.add(index)
                lay(self.replica, index, parameter, self._graphs)
                bucket = self.replica.bucket_of[index]
                bucket.missing -= 1
                if bucket.missing == 0:
                    self._send_full_buckets()

        return hook

    def _begin_backward(self) -> None:
        if self.hands is not None:
            self.hands.backward(self, self._forwards.trained())
        self._minibatch.advance(MinibatchEvent.BACKWARD_BEGINS)
        self._window.backwards += 1
        self.num_backwards += 1
        self._kept.forget()
        self.comm.charge_compute()
        self._sends = not self._only_accumulates and self._window.must_reduce(knows_last=self.has_loader)
        self._reset_buckets()
        # torch's own way to learn of the end of a backward pass; DDP uses it too.
        Variable._execution_engine.queue_callback(self._end_backward)  # noqa: SLF001

    def _reset_buckets(self) -> None:
        self._taken.clear()
        self._graphs.clear()
        self._next_bucket = 0
        for bucket in self.replica.buckets:
            bucket.missing = len(bucket.members)

    def _end_backward(self) -> None:
        untold, self._untold = self._untold, None
        if untold is not None:
            untold()
        if self._minibatch.phase is not Phase.BACKWARD:
            return  # it raised, and the loop has gone on to another batch
        if not self._sends:
            self._minibatch.advance(MinibatchEvent.GRADIENTS_KEPT)
            if self.is_in_block:
                self._kept.note(self.replica.trained)
            return
        self._complete()

    def _complete(self) -> None:
        """Send what was not sent during backward, wait, and give unused gradients back as None."""
        self._window.backwards = 0
        self._kept.forget()
        self._minibatch.advance(MinibatchEvent.GRADIENTS_REDUCED)
        is_further = self._minibatch.awaits_step
        # Of a loader also without a known optimizer: one may be made, whose first steps are left out.
        self._minibatch.awaits_step = bool(self.replica.optimizers) or self._batch is not None
        if not self._minibatch.awaits_step:
            self._minibatch.advance(MinibatchEvent.MINIBATCH_ENDS)
        if self.replica.buckets and self.comm.size > 1:
            for bucket in self.replica.buckets[self._next_bucket :]:
                self._fill(bucket)
                self._send(bucket)
        self.strategy.backward_done()
        if self.replica.buckets and self.comm.size > 1:
            self.replica.return_unused()
        connect(self._graphs, self.replica.trained)
        self._graphs = {}
        self._has_new_batch = False
        self.weights.spend()
        self._reduced.note(self.replica.trained)
        if self.on_gradients is not None:
            self.on_gradients(is_further)

    def _send_full_buckets(self) -> None:
        buckets = self.replica.buckets
        while self._next_bucket < len(buckets) and buckets[self._next_bucket].missing == 0:
            self._send(buckets[self._next_bucket])

    def _send(self, bucket: GradientBucket) -> None:
        self._next_bucket = bucket.index + 1
        if self._next_bucket == len(self.replica.buckets):
            unweighted = 1.0 / self.comm.size  # a batch without tokens uses them, a repeated one does not
            self.replica.flag_used(unweighted if self.replica.has_samples else 0.0)
        self.strategy.gradient_ready(bucket)

    def _fill(self, bucket: GradientBucket) -> None:
        with torch.no_grad():
            for index in bucket.members:
                if index not in self._taken:
                    lay(self.replica, index, self.replica.trained[index], self._graphs)

    def _before_step(self, optimizer: torch.optim.Optimizer) -> None:
        is_inside = self._minibatch.phase is Phase.BACKWARD or torch._C._current_graph_task_id() != -1  # noqa: SLF001
        refusals = {
            INSIDE_BACKWARD: is_inside and bool(self.replica.buckets),  # others' gradients are needed
            AMID_WINDOW: self.holds_back,
            OTHER_ORDER: self._ended_for_others_at == self.num_backwards,
        }
        for why, is_so in refusals.items():
            if is_so:
                raise ConfigError(f"rank {self.comm.rank}: {type(optimizer).__name__}.step() {why}")
        if self._minibatch.phase is Phase.UNSENT:  # fewer passes than declared: reduce now, after clipping
            if not self._has_warned and self.comm.rank == 0 and self.strategy.needs_gradients:
                warnings.warn(
                    f"optimizer.step() after {self._window.backwards} of {self.accumulation_steps}"
                    " accumulation steps: gradients are reduced now, after any clipping or unscaling",
                    stacklevel=3,
                )
            self._has_warned = True
            self.complete()
        if not self._stepped:
            self.strategy.before_update()

    def _after_step(self, optimizer: torch.optim.Optimizer) -> None:
        self.num_updates += 1
        self._stepped.add(id(optimizer))
        if len(self._stepped) == len(self.replica.optimizers):
            self._end_minibatch()
            self.strategy.after_update()
            if self.on_update is not None and not self.has_loader:
                self.on_update()
