"""Synchronous data-parallel SGD: gradients are summed over all ranks while backward still runs.

Buckets travel as they fill, in reverse order of use, and are awaited at the end of backward, so that
clipping and unscaling see complete gradients. Every rank then makes the same update. With `codec` the sums
are approximate, but still equal on all ranks: see docs/codecs.md.

Cost: the model's bytes, once per minibatch (once per accumulation window); fewer with a codec.   [tested]
"""

from __future__ import annotations

from typing import Any

import torch

from paceline import codecs
from paceline.codecs.kernel import ledger
from paceline.codecs.reducers.reducer import Layout, StagedWork, finish
from paceline.errors import ConfigError
from paceline.spec import Spec
from paceline.strategies.base.strategy import TrainingStrategy
from paceline.types import Bucket, Work


class AllReduce(TrainingStrategy):
    """Sum gradients, weighted by the ranks' sample counts, while backward still runs.

    Args:
        bucket_mib: Size in MiB at which a bucket of gradients is closed and sent; default 25, at most 8
            within one host over the native fabric. Smaller buckets start earlier and cost more.
        codec: How gradients are encoded, e.g. `int8`, `powersgd(rank=2)` or `error_feedback(codec=onebit)`;
            default none: exact. Worth it where the network, not the computation, limits the step. The flags
            that say which parameters were used always travel as they are.

    Raises:
        ConfigError: `bucket_mib` is not above 0, or the codec is unknown.

    Example:
        `all_reduce(codec=powersgd(rank=2))`

    Source: Li et al., PyTorch Distributed, VLDB 2020 (buckets and overlap).
    """

    advice = "Same result as one big machine; needs a network that can carry the whole model every step."
    needs_gradients = True

    def __init__(self, *, bucket_mib: float = 25.0, codec: str | Spec | None = None) -> None:
        if not bucket_mib > 0:
            raise ConfigError(f"all_reduce: bucket_mib={bucket_mib}: a size above 0 expected")
        self.bucket_bytes = int(bucket_mib * (1 << 20))
        self._reducer = None if codec is None else codecs.make_reducer(codec)
        self._works: list[Work] = []
        self._staged: list[tuple[StagedWork, torch.Tensor, torch.Tensor]] = []
        self._states: dict[str, dict[str, Any]] = {}
        self._broken: set[int] = set()  # parameters whose gradients are not finite on this rank

    def gradient_ready(self, bucket: Bucket) -> None:
        if self.comm.size == 1:
            return
        if self._reducer is None:
            self._works.append(self.comm.all_reduce(bucket.gradient))
            return
        gradient = bucket.values
        self._find_broken(bucket)
        if bucket.used_flags is not None:
            bucket.used_flags[sorted(self._broken)] = float("inf")
            self._works.append(self.comm.all_reduce(bucket.used_flags))
        flat = gradient.to(torch.float32)  # itself, if it is float32
        state = self._states.setdefault(str(bucket.index), {})
        state["tensor"] = bucket.index
        work = self._reducer.start(flat, self._layout(bucket), self.comm, state)
        self._staged.append((work, flat, gradient))

    def backward_done(self) -> None:
        works, self._works = self._works, []
        staged, self._staged = self._staged, []
        for work in works:
            work.wait()
        finish([work for work, _, _ in staged])
        for _, flat, gradient in staged:
            if flat.data_ptr() != gradient.data_ptr():
                gradient.copy_(flat)

        if staged:
            self._break_everywhere()

    def _find_broken(self, bucket: Bucket) -> None:
        """Note gradients that are not finite, and encode 0: a residual would never be rid of them."""
        if bool(bucket.values.sum().isfinite()):
            return
        for index in bucket.members:
            if not bool(self.replica.gradient_views[index].isfinite().all()):
                self._broken.add(index)
        bucket.values.nan_to_num_(0.0, 0.0, 0.0)

    def _break_everywhere(self) -> None:
        """What was not finite on one rank is not finite on all: a GradScaler then skips the step on all."""
        self._broken.clear()
        flags = next(b.used_flags for b in self.replica.buckets if b.used_flags is not None)
        if not bool(flags.isfinite().all()):
            for view, flag in zip(self.replica.gradient_views, flags.tolist(), strict=True):
                if flag == float("inf"):
                    view.fill_(float("nan"))

    def _layout(self, bucket: Bucket) -> Layout:
        start = bucket.gradient.storage_offset()
        views = [self.replica.gradient_views[i] for i in bucket.members]
        views = [torch.view_as_real(view) if view.is_complex() else view for view in views]
        return [(int(view.storage_offset() - start), view.shape) for view in views]

    def state_dict(self) -> dict[str, Any]:
        """Residuals and factors of the codec, per bucket."""
        return {"codec": self._states} if self._reducer is not None else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict()`; a state without a codec starts with empty residuals."""
        self._states = dict(state.get("codec", {}))

    def stats(self) -> dict[str, Any]:
        """`codec`: the codec's bytes by cause, encode seconds and extra memory on this rank."""
        if self._reducer is None:
            return {}
        return {"codec": ledger.total(self._reducer.stats(state) for state in self._states.values())}

    def traffic(self, model_bytes: int, size: int) -> float:
        """Every gradient once, as the codec encodes it."""
        if size == 1:
            return 0.0
        if self._reducer is None:
            return float(model_bytes)
        parts = [(b.values.numel(), self._layout(b)) for b in self.replica.buckets]
        return sum(self._reducer.traffic(numel, layout, size) for numel, layout in parts)
