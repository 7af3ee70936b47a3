"""Codecs between workers and shards, both ways.

Up, a worker encodes its update; with error feedback (or `threshold`) it keeps what was not sent, per shard.
Down, a shard remembers what each worker knows of its slice and encodes the difference W − known, so that
what one answer leaves out is in the next one. Both sides apply the same decoded payload, so they agree bit
for bit. Weights travel whole from a shard that was rebuilt, as it does not know what workers have, and at the
end, as the final model must be exact.

Source: Tang et al. (DoubleSqueeze), ICML 2019, for error feedback on both sides.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch

from paceline import local_work
from paceline.codecs.kernel import ledger
from paceline.codecs.kernel.codec import Codec
from paceline.codecs.kernel.random_stream import use_stream
from paceline.errors import ConfigError
from paceline.local_work import WorkKind
from paceline.types import Rank


def check(codec: Codec | None, flats: Sequence[torch.Tensor]) -> None:
    """Raise ConfigError unless the parameters are float32, or there is no codec."""
    wrong = [str(flat.dtype) for flat in flats if flat.dtype != torch.float32]
    if codec is not None and wrong:
        raise ConfigError(f"parameter_server(codec=…) needs float32 parameters, got {', '.join(wrong)}")


def stats(codec: Codec, pushes: PushEncoder, pulls: Iterable[PullEncoder]) -> dict[str, float]:
    """Bytes by cause, of this rank's pushes and of its shards' answers."""
    answers = [state for pull in pulls for state in pull.states.values()]
    return ledger.total(map(codec.stats, [*pushes.states.values(), *answers]))


def claimed_bytes(codec: Codec, model_bytes: int, num_shards: int) -> float:
    """Bytes of a whole model one way, with a codec whose payload sizes are known beforehand."""
    numel = model_bytes // 4
    cuts = [j * numel // num_shards for j in range(num_shards + 1)]
    return sum(codec.max_encoded_bytes(end - start) for start, end in pairwise(cuts))


def measured_bytes(counts: Mapping[str, float], num_shards: int) -> float:
    """The same with a codec whose payload sizes depend on the values, from what `stats` counted."""
    return counts["encoded_bytes"] / max(1.0, counts["encodes"]) * num_shards


class PushEncoder:
    """The worker's side: payloads of updates, and a codec state for each piece of each shard's slice."""

    def __init__(self, codec: Codec, rank: Rank) -> None:
        self._codec, self._rank = codec, rank
        self.states: dict[str, dict[str, Any]] = {}

    def encode(self, shard: int, pieces: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """One payload per piece."""
        payloads = []
        for i, piece in enumerate(pieces):
            state = self.states.setdefault(f"{shard}.{i}", {})
            use_stream(state, "push", self._rank, shard, i)
            payloads.append(self._codec.encode(piece, state).clone())
        return payloads


class PullEncoder:
    """A shard's side: decodes updates; what each worker knows, and the difference that it gets."""

    def __init__(
        self, codec: Codec, shard: int, weights: Sequence[torch.Tensor], workers: Sequence[Rank]
    ) -> None:
        self._codec, self._shard = codec, shard
        self.known = {str(rank): [w.clone() for w in weights] for rank in workers}
        self.states: dict[str, dict[str, Any]] = {}

    def decode(self, payloads: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """An update as tensors like `weights`."""
        pieces = [torch.zeros_like(w) for w in weights]
        for payload, piece in zip(payloads, pieces, strict=True):
            self._codec.decode(payload, piece)
        return pieces

    def encode(self, rank: Rank, weights: Sequence[torch.Tensor]) -> list[torch.Tensor] | None:
        """Payloads that bring `rank` closer to `weights`; None if they must be sent whole.

        That is so after a rebuild, when it is not known what the worker has.
        """
        known = self.known.get(str(rank))
        if known is None:
            self.sent_whole(rank, weights)
            return None
        payloads = []
        for i, (weight, has) in enumerate(zip(weights, known, strict=True)):
            # What is not sent stays in the difference to `known`: a residual of the codec's own starts empty.
            residual = torch.zeros_like(weight) if self._codec.keeps_residual else None
            state = self.states.setdefault(f"{rank}.{i}", {})
            use_stream(state, "pull", rank, self._shard, i)
            local_work.charge_passes([weight], 1, WorkKind.SERVER)
            payload = self._codec.encode_with_residual(weight - has, residual, state).clone()
            self._codec.decode(payload, has, accumulate=True)
            payloads.append(payload)
        return payloads

    def sent_whole(self, rank: Rank, weights: Sequence[torch.Tensor]) -> None:
        """Note that `rank` is given the weights themselves."""
        self.known[str(rank)] = [w.clone() for w in weights]

    def state_dict(self) -> dict[str, Any]:
        """What workers know, and the codec's state."""
        return {"known": self.known, "states": self.states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.known, self.states = dict(state["known"]), dict(state["states"])
