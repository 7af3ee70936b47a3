"""What a strategy sees of the model that it trains.

Strategies, codecs and reducers themselves are abstract classes beside the code that calls them:
`strategies.base.strategy.TrainingStrategy`, `codecs.kernel.codec.Codec`, `codecs.reducers.reducer.Reducer`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

if TYPE_CHECKING:
    import torch


Batch: TypeAlias = Any
"""What a user's data loader yields: tensors in any nesting."""


class Bucket(Protocol):
    """Gradients that are reduced at once. Its tensors are views of a flat gradient buffer of the replica."""

    @property
    def index(self) -> int:
        """Number of the bucket; buckets become ready in this order on every rank."""

    @property
    def gradient(self) -> torch.Tensor:
        """1-D, everything to reduce: `values`, and behind them `used_flags` in the last bucket."""

    @property
    def values(self) -> torch.Tensor:
        """1-D, the gradients alone, already multiplied by `Replica.weight`; zeros between parameters."""

    @property
    def used_flags(self) -> torch.Tensor | None:
        """Last bucket: one element per parameter of `Replica.trained`, above 0 if it was used, else 0.

        They must be summed over ranks like gradients. None in the other buckets.
        """

    @property
    def members(self) -> Sequence[int]:
        """Indices into `Replica.trained` of the parameters whose gradients lie here."""


class Replica(Protocol):
    """One worker's model as flat buffers with views, one per (dtype, device); the module stays the truth."""

    @property
    def parameters(self) -> Sequence[torch.Tensor]:
        """1-D flat parameter buffers, allocated by the communicator; the module's parameters are views.

        Complex parameters lie in real buffers, as pairs.
        """

    @property
    def gradients(self) -> Sequence[torch.Tensor]:
        """1-D flat gradient buffers in the order of `parameters`; empty unless the strategy needs them."""

    @property
    def buckets(self) -> Sequence[Bucket]:
        """Slices of the gradient buffers, in the order in which backward completes them."""

    @property
    def trained(self) -> Sequence[torch.Tensor]:
        """The module's parameters that require gradients, each once."""

    @property
    def gradient_views(self) -> Sequence[torch.Tensor]:
        """The place of each trained parameter's gradient in the flat buffers, with the parameter's shape."""

    @property
    def weight(self) -> float:
        """What this rank's gradients count: its share of the minibatch's samples or tokens.

        1/P where several backward passes are added up: their shares are in the gradients then. The weights of
        all ranks add up to 1.
        """

    @property
    def has_samples(self) -> bool:
        """False when this rank ran out of data and repeats a batch with weight 0."""

    @property
    def model_bytes(self) -> int:
        """Size of the flat parameter buffers, alignment included."""

    def adopt(self) -> None:
        """Copy parameters whose memory the user replaced (`p.data = …`) back into the flat buffers."""

    def optimizer_state(self) -> Iterator[tuple[str, torch.Tensor]]:
        """State tensors of the optimizers, in an order that all ranks share: (key, tensor itself)."""
