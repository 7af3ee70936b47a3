"""Codecs between workers and shards, both ways.

Up, a worker encodes its update; with error feedback (or `threshold`) it keeps what was not sent, per shard.
Down, a shard remembers what each worker knows of its slice and encodes the difference: W − known, so that
what one answer leaves out is in the next one. Both apply the same decoded payload, so they agree bit for bit.
A shard that was rebuilt knows nothing of that, nor does the end need it: there the weights travel whole.

Source: Tang et al. (DoubleSqueeze), ICML 2019, for error feedback on both sides.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from paceline.codecs.kernel import ledger
from paceline.codecs.kernel.codec import Codec
from paceline.errors import ConfigError
from paceline.types import Rank


def check(codec: Codec | None, flats: Sequence[torch.Tensor]) -> None:
    """ConfigError unless the parameters are what codecs take."""
    wrong = [str(f.dtype) for f in flats if f.dtype != torch.float32]
    if codec is not None and wrong:
        raise ConfigError(f"parameter_server(codec=…) needs float32 parameters, got {', '.join(wrong)}")


def stats(codec: Codec | None, pushes: Pushes | None, shards: Iterable[Any]) -> dict[str, Any]:
    """`codec`: bytes by cause, of this rank's pushes and of its shards' answers."""
    if codec is None or pushes is None:
        return {}
    answers = [state for shard in shards for state in shard.pulls.states.values()]
    return {"codec": ledger.total(map(codec.stats, [*pushes.states.values(), *answers]))}


def encoded_bytes(codec: Codec | None, model_bytes: int, shards: int, method: Any) -> float:
    """What a whole model takes one way: claimed, or as measured where values decide."""
    if codec is None:
        return model_bytes
    if codec.is_sparse:
        made = method.stats()["codec"]
        return float(made["encoded_bytes"] / max(1.0, made["encodes"]) * shards)
    numel = model_bytes // 4
    return sum(
        codec.max_encoded_bytes((j + 1) * numel // shards - j * numel // shards) for j in range(shards)
    )


class Pushes:
    """The worker's side: payloads of updates, and a residual for each piece of each shard's slice."""

    def __init__(self, codec: Codec) -> None:
        self._codec = codec
        self.states: dict[str, dict[str, Any]] = {}

    def encode(self, shard: int, pieces: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """One payload per piece."""
        payloads = []
        for i, piece in enumerate(pieces):
            payloads.append(self._codec.encode(piece, self.states.setdefault(f"{shard}.{i}", {})).clone())
        return payloads


class Pulls:
    """A shard's side: decodes updates; what each worker knows, and the difference that it gets."""

    def __init__(self, codec: Codec, weights: Sequence[torch.Tensor], workers: Sequence[Rank]) -> None:
        self._codec = codec
        self.known = {str(r): [w.clone() for w in weights] for r in workers}
        self.states: dict[str, dict[str, Any]] = {}

    def decode(self, payloads: Sequence[torch.Tensor], weights: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """An update as tensors like `weights`."""
        pieces = [torch.zeros_like(w) for w in weights]
        for payload, piece in zip(payloads, pieces, strict=True):
            self._codec.decode(payload, piece)
        return pieces

    def encode(self, rank: Rank, weights: Sequence[torch.Tensor]) -> list[torch.Tensor] | None:
        """What brings `rank` nearer to `weights`; None if it is not known what it has: send them whole."""
        known = self.known.get(str(rank))
        if known is None:
            self.known[str(rank)] = [w.clone() for w in weights]
            return None
        payloads = []
        for i, (weight, has) in enumerate(zip(weights, known, strict=True)):
            rest = torch.zeros_like(weight) if self._codec.keeps_residual else None  # `known` keeps the rest
            state = self.states.setdefault(f"{rank}.{i}", {})
            payload = self._codec.encode_with_residual(weight - has, rest, state).clone()
            self._codec.decode(payload, has, accumulate=True)
            payloads.append(payload)
        return payloads

    def whole(self, rank: Rank, weights: Sequence[torch.Tensor]) -> None:
        """`rank` is given the weights themselves."""
        self.known[str(rank)] = [w.clone() for w in weights]

    def state_dict(self) -> dict[str, Any]:
        """What workers know, and the codec's state."""
        return {"known": self.known, "states": self.states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue."""
        self.known, self.states = dict(state["known"]), dict(state["states"])
