"""Error feedback around any codec: what was not sent is added to the next tensor.

    v = x + r;  send encode(v);  r ← v − decode(encode(v))

The residual is `state["residual"]` and belongs in the checkpoint. All kernels update it in the same pass
that encodes.
"""

from __future__ import annotations

from typing import Any, final

import torch

from paceline import codecs
from paceline.codecs.kernel.codec import Codec
from paceline.errors import ConfigError
from paceline.spec import Spec


@final
class ErrorFeedback(Codec):
    """Keep what a codec did not send, and add it to the next tensor.

    What is sent late meets a momentum that has gone on without it. At a learning rate near the edge of
    stability this overshoots, and a coarse codec is then worse with feedback than without: give `onebit`
    `block=32`, or lower the learning rate.

    Args:
        codec: The codec to wrap, required. Around `threshold`, which keeps a residual of its own, error
            feedback changes nothing. `powersgd` keeps one too and cannot be wrapped.

    Raises:
        ConfigError: A codec that does not exist, or error feedback twice.

    Example:
        `all_reduce(codec=error_feedback(codec=onebit))`

    Source: Seide et al., Interspeech 2014; Karimireddy et al., ICML 2019.
    """

    def __init__(self, *, codec: str | Spec | Codec) -> None:
        self._codec = codecs.make(codec)
        if isinstance(self._codec, ErrorFeedback):
            raise ConfigError("error_feedback(codec=error_feedback(…)): once is enough")
        self.is_unbiased = False
        self.is_sparse = self._codec.is_sparse

    keeps_residual = True

    def set_options(self, *, checksum: bool = False, use_reference: bool = False) -> None:
        self._codec.set_options(checksum=checksum, use_reference=use_reference)

    def max_encoded_bytes(self, numel: int) -> int:
        return self._codec.max_encoded_bytes(numel)

    def encode(
        self, x: torch.Tensor, state: dict[str, Any], *, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Encode x + residual and keep what is not sent."""
        if "residual" not in state:
            state["residual"] = torch.zeros(x.numel(), dtype=torch.float32, device=x.device)
        return self.encode_with_residual(x, state["residual"], state, out=out)

    def encode_with_residual(
        self,
        x: torch.Tensor,
        residual: torch.Tensor | None,
        state: dict[str, Any],
        *,
        out: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self._codec.encode_with_residual(x, residual, state, out=out)

    def decode(self, payload: torch.Tensor, out: torch.Tensor, *, accumulate: bool = False) -> None:
        self._codec.decode(payload, out, accumulate=accumulate)
