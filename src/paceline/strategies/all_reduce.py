"""Synchronous data-parallel SGD: gradients are summed over all ranks while backward still runs.

Buckets travel as they fill, in reverse order of use, and are awaited at the end of backward, so that
clipping and unscaling see complete gradients. Every rank then makes the same update.

Cost: the model's bytes, once per minibatch (once per accumulation window).   [tested]
"""

from __future__ import annotations

from paceline.errors import ConfigError
from paceline.strategies.strategy import TrainingStrategy
from paceline.types import Bucket, Work


class AllReduce(TrainingStrategy):
    """Sum gradients, weighted by the ranks' sample counts, in buckets of `bucket_mib` MiB."""

    advice = "Same result as one big machine; needs a network that carries the model's size every step."
    needs_gradients = True

    def __init__(self, *, bucket_mib: float = 25.0) -> None:
        if not bucket_mib > 0:
            raise ConfigError(f"all_reduce: bucket_mib={bucket_mib}: a size above 0 expected")
        self.bucket_bytes = int(bucket_mib * (1 << 20))
        self._works: list[Work] = []

    def gradient_ready(self, bucket: Bucket) -> None:
        """Start summing this bucket."""
        if self.comm.size > 1:
            self._works.append(self.comm.all_reduce(bucket.gradient))

    def backward_done(self) -> None:
        """Wait for all buckets."""
        works, self._works = self._works, []
        for work in works:
            work.wait()

    def traffic(self, model_bytes: int, size: int) -> float:
        """Every gradient once."""
        return float(model_bytes) if size > 1 else 0.0
