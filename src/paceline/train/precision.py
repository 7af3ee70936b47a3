"""Mixed precision without a change to the loop: `prepare(..., precision="bf16" | "fp16" | "fp32")`.

The model's forward runs under autocast and returns float32. For fp16 the loss is scaled where its gradient
enters
the model: gradients are linear in it, so this equals scaling the loss. At the end of backward, before
clipping, the
gradients are unscaled and checked. If one is not finite, all become None, which makes `optimizer.step()` a
no-op;
the minibatch still counts, so the strategies' periods and clocks stay in step on all ranks.

Source: Micikevicius et al., ICLR 2018; the scale's rule is that of torch.amp.GradScaler.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch.utils import _pytree as pytree

from paceline.errors import ConfigError
from paceline.train.attachment import Attachment
from paceline.types import Communicator, ReduceOp

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

    def __init__(self, dtype: torch.dtype, attachment: Attachment, comm: Communicator) -> None:
        self.scale = INITIAL_SCALE if dtype == torch.float16 else 1.0
        self.skipped = 0
        """Minibatches whose update was left out because a gradient overflowed."""
        self._good = 0
        self._attachment, self._comm = attachment, comm
        self._is_scaling = dtype == torch.float16
        self._wrap(attachment.replica.module, dtype)
        if self._is_scaling:
            attachment.on_gradients = self._unscale
        attachment.keep(self)

    def remove(self) -> None:
        """Take the autocast off again."""
        del self._attachment.replica.module.forward
        self._attachment.on_gradients = None

    def _wrap(self, module: torch.nn.Module, dtype: torch.dtype) -> None:
        forward = module.forward
        device = next((p.device.type for p in module.parameters()), "cpu")

        @functools.wraps(forward)
        def run(*arguments: Any, **named: Any) -> Any:
            with torch.autocast(device, dtype):
                outputs = forward(*arguments, **named)
            return pytree.tree_map(self._leave, outputs)

        # On the instance: the class, its name and its state_dict stay as they are.
        module.forward = run

    def _leave(self, output: Any) -> Any:
        if not isinstance(output, torch.Tensor) or not output.is_floating_point():
            return output
        output = output.float()
        if self._is_scaling and output.requires_grad:
            output.register_hook(lambda gradient: gradient * self.scale)
        return output

    @torch.no_grad()
    def _unscale(self) -> None:
        replica = self._attachment.replica
        gradients = [p.grad for p in replica.trained if p.grad is not None]
        overflow = torch.zeros(1, device=gradients[0].device if gradients else None)
        inverse = torch.full_like(overflow, 1 / self.scale)
        for dtype in {g.dtype for g in gradients}:
            same = [g for g in gradients if g.dtype == dtype]
            torch._amp_foreach_non_finite_check_and_unscale_(same, overflow, inverse)
        strategy = self._attachment.strategy
        # Reduced gradients are the same everywhere; local ones need an agreement, except between ranks
        # that do
        # not wait for each other.
        if self._comm.size > 1 and not strategy.needs_gradients and not strategy.survives_loss:
            self._comm.all_reduce(overflow, op=ReduceOp.MAX).wait()
        if float(overflow):
            for parameter in replica.trained:
                parameter.grad = None
            self.skipped += 1
            self._good = 0
            self.scale = max(1.0, self.scale / 2)
            return
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
