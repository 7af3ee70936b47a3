"""`DistributedOptimizer`: an optimizer of the same class whose `step` sees averaged gradients."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from paceline.compat.horovod import operations as o
from paceline.compat.horovod.compression import Compression, Compressor
from paceline.compat.horovod.constants import Adasum, Average, Operation
from paceline.compat.horovod.functions import broadcast_object
from paceline.compat.horovod.world import ProcessSet, global_process_set, members
from paceline.schedule.program import chunk_offsets

Groups = int | list[list[Tensor]] | None
"""Horovod's `groups`: how many to form, or which parameters are reduced together."""


class _Reducer:
    """Launches an all-reduce per gradient (or group) as backward produces it, and collects the results."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        named_parameters: Iterable[tuple[str, Tensor]] | None,
        *,
        compression: type[Compressor],
        passes: int,
        op: Operation,
        predivide: float,
        groups: Groups,
        sparse_as_dense: bool,
        process_set: ProcessSet,
    ) -> None:
        self.names = _names(optimizer, named_parameters)
        self.compression, self.op, self.predivide = compression, op, predivide
        self.sparse_as_dense, self.process_set, self.passes = sparse_as_dense, process_set, passes
        self.parameters = [p for g in optimizer.param_groups for p in g["params"] if p.requires_grad]
        self.group_of = self._form_groups(groups)
        self.remaining = dict.fromkeys(self.parameters, passes)
        self.ready: dict[tuple[Tensor, ...], set[Tensor]] = {}
        self.handles: dict[tuple[Tensor, ...], Any] = {}
        self.made_dense: set[Tensor] = set()
        self.hooks: list[Any] = []
        # An elastic job may start alone and grow.
        if process_set.included() and (
            len(members(process_set)) > 1 or os.environ.get("HOROVOD_ELASTIC") == "1"
        ):
            self.hooks = [p.register_post_accumulate_grad_hook(self._on_gradient) for p in self.parameters]

    def _form_groups(self, groups: Groups) -> dict[Tensor, tuple[Tensor, ...]]:
        """Return the group of each parameter; alone where no groups are asked for."""
        lists: list[Sequence[Tensor]] = []
        if isinstance(groups, int) and not isinstance(groups, bool) and groups > 0:
            # All ranks must form the same groups: rank 0's order counts.
            order = broadcast_object([self.names[p] for p in self.parameters], process_set=self.process_set)
            ordered = sorted(self.parameters, key=lambda p: order.index(self.names[p]))
            bounds = chunk_offsets(len(ordered), groups).tolist()
            lists = [ordered[a:b] for a, b in pairwise(bounds)]
        elif isinstance(groups, list):
            lists = list(groups)
        elif groups not in (None, 0):
            raise ValueError("groups should be a non-negative integer or a list of lists of parameters")
        of: dict[Tensor, tuple[Tensor, ...]] = {p: (p,) for p in self.parameters}
        for listed in lists:
            group = tuple(p for p in listed if p.requires_grad)
            of.update(dict.fromkeys(group, group))
        return of

    def _on_gradient(self, p: Tensor) -> None:
        if self.remaining[p] <= 0:
            raise AssertionError(
                "Gradients were computed more than backward_passes_per_step times before call to step(). "
                "Increase backward_passes_per_step to accumulate gradients locally."
            )
        self.remaining[p] -= 1
        if self.remaining[p] == 0:
            group = self.group_of[p]
            ready = self.ready.setdefault(group, set())
            ready.add(p)
            if len(ready) == len(group):
                self._launch(group)

    def _launch(self, group: tuple[Tensor, ...]) -> None:
        self.ready.pop(group, None)
        for p in group:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
            elif p.grad.is_sparse and self.sparse_as_dense:
                p.grad = p.grad.to_dense()
                self.made_dense.add(p)
        name = self.names[group[0]]
        if any(p.grad is not None and p.grad.is_sparse for p in group):
            if len(group) > 1:
                raise ValueError("sparse gradients cannot be grouped: use sparse_as_dense=True or no groups")
            assert group[0].grad is not None
            wait = o.sparse_allreduce_async(group[0].grad, name, self.op, self.process_set)
            self.handles[group] = (wait, None)
            return
        pairs = [self.compression.compress(p.grad) for p in group if p.grad is not None]
        factors = (1 / self.predivide, self.predivide) if self.op is Average else (1.0, 1.0)
        handle = o.grouped_allreduce_async_(
            [t for t, _ in pairs], name=name, op=self.op, prescale_factor=factors[0],
            postscale_factor=factors[1], process_set=self.process_set,
        )  # fmt: skip
        self.handles[group] = (handle, [c for _, c in pairs])

    def collect(self) -> None:
        """Launch what has not been launched, wait for all, and put the results into `.grad`."""
        if not self.hooks:
            return
        # The order may differ between ranks (names match), but a parameter without gradient must take part.
        for group in dict.fromkeys(self.group_of[p] for p in self.parameters):
            if group not in self.handles:
                self._launch(group)
        for group, (handle, contexts) in self.handles.items():
            if callable(handle):
                group[0].grad = handle()
            else:
                for p, output, context in zip(group, o.synchronize(handle), contexts, strict=True):
                    restored = self.compression.decompress(output, context)
                    assert p.grad is not None
                    if restored.data_ptr() != p.grad.data_ptr():
                        p.grad.copy_(restored)
                    if p in self.made_dense:
                        # The optimizer may know sparse gradients only.
                        p.grad = p.grad.to_sparse(1)
        self.reset()

    def reset(self) -> None:
        """Expect `passes` backward passes again."""
        self.handles.clear()
        self.made_dense.clear()
        self.ready.clear()
        self.remaining = dict.fromkeys(self.parameters, self.passes)


def _names(
    optimizer: torch.optim.Optimizer, named_parameters: Iterable[tuple[str, Tensor]] | None
) -> dict[Tensor, str]:
    every = [p for g in optimizer.param_groups for p in g["params"]]
    if named_parameters is None:
        groups = enumerate(optimizer.param_groups)
        return {p: f"allreduce.noname.{i}.{j}" for i, g in groups for j, p in enumerate(g["params"])}
    named = list(named_parameters)
    if any(not isinstance(n, tuple) for n in named):
        raise ValueError(
            "named_parameters should be a sequence of tuples (name, parameter), usually produced by "
            "model.named_parameters()."
        )
    seen: set[str] = set()
    doubled = sorted({k for k, _ in named if k in seen or seen.add(k)})  # type: ignore[func-returns-value]
    if doubled:
        raise ValueError(
            f"Parameter names in named_parameters must be unique. Found duplicates: {', '.join(doubled)}"
        )
    names = {p: k for k, p in named}
    unnamed = sum(p not in names for p in every)
    if unnamed:
        raise ValueError(
            f"named_parameters was specified, but {unnamed} of the optimizer's parameters were not named."
        )
    return names


class _Distributed:
    """The methods that `DistributedOptimizer` puts over those of the wrapped optimizer's class."""

    gradient_reducer: _Reducer
    _is_synchronized = False
    _must_synchronize = True

    @property
    def _parameter_names(self) -> dict[Tensor, str]:
        """Names by parameter; scripts for Horovod read it."""
        return self.gradient_reducer.names

    def set_backward_passes_per_step(self, passes: int) -> None:
        """Change how many backward passes precede a step."""
        self.gradient_reducer.passes = passes
        self.gradient_reducer.reset()

    def synchronize(self) -> None:
        """Wait until all gradients are reduced, for instance to clip them before `step`."""
        self.gradient_reducer.collect()
        self._is_synchronized = True

    @contextmanager
    def skip_synchronize(self) -> Iterator[None]:
        """Within it, `step` does not synchronize; for use after `synchronize()`."""
        self._must_synchronize = False
        try:
            yield
        finally:
            self._must_synchronize = True

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Wait until all gradients are reduced, then update."""
        if self._must_synchronize:
            if self._is_synchronized:
                warnings.warn(
                    "optimizer.step() called without optimizer.skip_synchronize() context after "
                    "optimizer.synchronize(). This can cause training slowdown. You may want to consider "
                    "using optimizer.skip_synchronize() context if you use optimizer.synchronize() in your "
                    "code.",
                    stacklevel=2,
                )
            self.synchronize()
        self._is_synchronized = False
        return super().step(closure)  # type: ignore[misc, no-any-return]

    def zero_grad(self, *args: object, **kwargs: object) -> None:
        """Clear gradients; an AssertionError between backward and step, where all-reduces are in flight."""
        if self.gradient_reducer.handles:
            raise AssertionError(
                "optimizer.zero_grad() was called after loss.backward() but before optimizer.step() or "
                "optimizer.synchronize(). This is prohibited as it can cause a race condition."
            )
        super().zero_grad(*args, **kwargs)  # type: ignore[misc]

    def load_state_dict(self, *args: object, **kwargs: object) -> None:
        """Load, and forget passes that were under way."""
        self.gradient_reducer.reset()
        self._is_synchronized = False
        super().load_state_dict(*args, **kwargs)  # type: ignore[misc]


def DistributedOptimizer(
    optimizer: torch.optim.Optimizer,
    named_parameters: Iterable[tuple[str, Tensor]] | None = None,
    compression: type[Compressor] = Compression.none,
    backward_passes_per_step: int = 1,
    op: Operation = Average,
    gradient_predivide_factor: float = 1.0,
    num_groups: int = 0,
    groups: Groups = None,
    sparse_as_dense: bool = False,
    process_set: ProcessSet = global_process_set,
) -> torch.optim.Optimizer:
    """Make `optimizer` average gradients over the ranks while backward runs; it stays an instance of its
    class.

    With `backward_passes_per_step` = n, gradients of n passes are added up locally before they travel. With
    Adasum the gradients (not the updates) are combined.
    """
    if gradient_predivide_factor != 1.0 and op is not Average:
        raise ValueError("gradient_predivide_factor not supported with op != Average")
    if op is Adasum and (num_groups or groups):
        raise NotImplementedError("Adasum with groups: leave groups out; each tensor is combined by itself")
    if num_groups:
        warnings.warn("num_groups is deprecated; use groups", DeprecationWarning, stacklevel=2)
        groups = groups if groups is not None else num_groups
    if backward_passes_per_step < 1:
        raise ValueError(f"backward_passes_per_step must be at least 1, got {backward_passes_per_step}")
    reducer = _Reducer(
        optimizer, named_parameters, compression=compression, passes=backward_passes_per_step, op=op,
        predivide=gradient_predivide_factor, groups=groups, sparse_as_dense=sparse_as_dense,
        process_set=process_set,
    )  # fmt: skip
    # A subclass made for this optimizer: schedulers and scalers check isinstance; its state stays in place.
    cls = type(optimizer)
    optimizer.__class__ = type(cls.__name__, (_Distributed, cls), {})
    optimizer.gradient_reducer = reducer  # type: ignore[attr-defined]
    return optimizer
