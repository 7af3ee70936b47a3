"""Mixed precision without a change to the loop: `prepare(..., precision="bf16" | "fp16" | "fp32")`.

The model's forward runs under autocast and returns float32 (float64 stays). For fp16, losses are scaled
inside the model alone (see `modules/low_precision.py`). At the end of backward, before clipping, the
gradients are checked. If one is not finite, all become None, which makes `optimizer.step()` a no-op; the
minibatch still counts, so the strategies' periods and clocks stay in step on all ranks. Gradients that are
summed are the same everywhere, and so is the decision; where each rank steps by itself, it also decides by
itself, without a message.

Source: Micikevicius et al., ICLR 2018; the scale's rule is that of torch.amp.GradScaler.
"""

from __future__ import annotations

from typing import Any

import torch

from paceline.errors import ConfigError
from paceline.train.attachment import Attachment
from paceline.train.modules.low_precision import LowPrecisionForward
from paceline.train.replica import real

DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
INITIAL_SCALE = 65536.0
GROWTH_INTERVAL = 2000


def check(precision: str | None) -> torch.dtype | None:
    """Return the low-precision dtype, None for fp32; ConfigError for another name."""
    if precision is None:
        return None
    if precision not in DTYPES:
        raise ConfigError(f"precision={precision!r}: one of {', '.join(map(repr, DTYPES))} expected")
    return DTYPES[precision]


class MixedPrecision:
    """Autocast around one prepared model; loss scaling for fp16. Has a state for checkpoints."""

    def __init__(self, dtype: torch.dtype, attachment: Attachment) -> None:
        self.scale = INITIAL_SCALE if dtype == torch.float16 else 1.0
        self.skipped = 0
        """Minibatches whose update was left out because a gradient overflowed."""
        self._good = 0
        self._has_overflowed = False  # in the minibatch in progress
        self._attachment = attachment
        self._is_scaling = dtype == torch.float16
        module: Any = attachment.replica.module
        self._forward = LowPrecisionForward(module, dtype, self._current if self._is_scaling else None)
        # On the instance: the class, its name and its state_dict stay as they are.
        module.forward = self._forward
        if self._is_scaling:
            attachment.on_gradients = self._check
        attachment.keep(self)

    def remove(self) -> None:
        """Take the autocast off again."""
        module: Any = self._attachment.replica.module
        if vars(module).get("forward") is self._forward:
            del module.forward
            if self._forward.inner is not None:
                module.forward = self._forward.inner
        self._attachment.on_gradients = None

    def _current(self) -> float:
        return self.scale

    @torch.no_grad()
    def _check(self, is_further: bool) -> None:
        """At the end of a backward pass.

        Args:
            is_further: Whether an earlier pass of the same minibatch was checked, whose step is to come.
        """
        was_dropped = is_further and self._has_overflowed
        replica = self._attachment.replica
        gradients = [real(p.grad) for p in replica.trained if p.grad is not None]
        overflow = torch.zeros(1, device=gradients[0].device if gradients else None)
        one = torch.ones_like(overflow)
        for dtype in {g.dtype for g in gradients}:
            same = [g for g in gradients if g.dtype == dtype]
            torch._amp_foreach_non_finite_check_and_unscale_(same, overflow, one)
        self._has_overflowed = was_dropped or bool(overflow)
        if self._has_overflowed:
            for parameter in replica.trained:
                parameter.grad = None
        # A minibatch counts once, however many passes it has.
        if self._has_overflowed and not was_dropped:
            self.skipped += 1
            self._good = 0
            self.scale = max(1.0, self.scale / 2)
        elif not self._has_overflowed and not is_further:
            self._good += 1
            if self._good == GROWTH_INTERVAL:
                self._good = 0
                self.scale *= 2

    def state_dict(self) -> dict[str, Any]:
        """Return the scale and the counters."""
        return {"scale": self.scale, "good": self._good, "skipped": self.skipped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from what `state_dict` gave."""
        self.scale, self._good, self.skipped = state["scale"], state["good"], state["skipped"]
