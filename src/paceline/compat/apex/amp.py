"""`amp.initialize` and `amp.scale_loss`: mixed precision in Apex's words, done by torch.amp.

O0 is fp32. O1 and O2 run the forward pass under autocast; parameters stay fp32, so O2's separate master
weights are not needed. O3 casts the model itself. The low precision is float16 with loss scaling on GPUs, and
bfloat16 without it on CPUs.
"""

from __future__ import annotations

import functools
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from paceline.compat.apex.casts import (
    casts,
    disable_casts,
    float_function,
    half_function,
    promote_function,
    register_float_function,
    register_half_function,
    register_promote_function,
)
from paceline.errors import ConfigError

__all__ = [
    "disable_casts",
    "float_function",
    "half_function",
    "initialize",
    "load_state_dict",
    "master_params",
    "promote_function",
    "register_float_function",
    "register_half_function",
    "register_promote_function",
    "scale_loss",
    "state_dict",
]
_LEVELS = ("O0", "O1", "O2", "O3")
Models = nn.Module | Sequence[nn.Module]
Optimizers = torch.optim.Optimizer | Sequence[torch.optim.Optimizer]


class _State:
    """What `initialize` decided; one per process, as in Apex."""

    def __init__(self) -> None:
        self.is_enabled = False
        self.scalers: list[torch.amp.GradScaler] = []
        self.unscaled: dict[int, torch.amp.GradScaler] = {}


_state = _State()


def initialize(
    models: Models,
    optimizers: Optimizers | None = None,
    enabled: bool = True,
    opt_level: str = "O1",
    cast_model_type: torch.dtype | None = None,
    patch_torch_functions: bool | None = None,
    keep_batchnorm_fp32: bool | None = None,
    master_weights: bool | None = None,
    loss_scale: float | str | None = None,
    cast_model_outputs: torch.dtype | None = None,
    num_losses: int = 1,
    verbosity: int = 1,
    min_loss_scale: float | None = None,
    max_loss_scale: float = 2.0**24,
) -> Models | tuple[Models, Optimizers]:
    """Prepare models and optimizers; returns them in the form they were given.

    `loss_scale`: "dynamic" or a number that stays. `patch_torch_functions`: whether decorated and registered
    functions cast their arguments; default only under O1. Options without a meaning under torch.amp are
    accepted.
    """
    if opt_level not in _LEVELS:
        raise ConfigError(f"amp.initialize(opt_level={opt_level!r}): one of {', '.join(_LEVELS)} expected")
    model_list = list(models) if isinstance(models, Sequence) else [models]
    for model in model_list:
        if not isinstance(model, nn.Module):
            raise ConfigError(f"amp.initialize: a module expected, got {type(model).__name__}")
        if isinstance(model, nn.parallel.DistributedDataParallel):
            raise ConfigError("amp.initialize: call it before wrapping the model in DistributedDataParallel")
    _state.is_enabled = enabled and opt_level != "O0"
    on_gpu = any(p.is_cuda for m in model_list for p in m.parameters())
    device = "cuda" if on_gpu else "cpu"
    dtype = cast_model_type or (torch.float16 if on_gpu else torch.bfloat16)
    casts.is_on = False
    if _state.is_enabled:
        is_o1 = opt_level == "O1" if patch_torch_functions is None else patch_torch_functions
        if is_o1:
            casts.start(dtype)
        for model in model_list:
            _cast(model, device, dtype, whole_model=opt_level == "O3", can_pause=is_o1)
    needs_scaling = _state.is_enabled and dtype == torch.float16
    _state.scalers = [_scaler(loss_scale, needs_scaling, device) for _ in range(num_losses)]
    optimizer_list = list(optimizers) if isinstance(optimizers, Sequence) else [optimizers]
    for optimizer in optimizer_list:
        if optimizer is not None:
            _skip_steps_that_overflowed(optimizer)
    return models if optimizers is None else (models, optimizers)


def _scaler(loss_scale: float | str | None, enabled: bool, device: str) -> torch.amp.GradScaler:
    if loss_scale is None or loss_scale == "dynamic":
        return torch.amp.GradScaler(device, enabled=enabled)
    # A growth interval that is never reached and factors next to one keep the scale where it is.
    never = 2**31 - 1
    return torch.amp.GradScaler(
        device, float(loss_scale), growth_factor=1.0 + 1e-9, growth_interval=never, enabled=enabled
    )


def _cast(model: nn.Module, device: str, dtype: torch.dtype, *, whole_model: bool, can_pause: bool) -> None:
    if whole_model:
        model.to(dtype)
    forward: Callable[..., Any] = model.forward

    @functools.wraps(forward)
    def run(*args: object, **kwargs: object) -> object:
        with torch.autocast(device, dtype, enabled=not (can_pause and casts.is_paused)):
            output = forward(*args, **kwargs)
        return output.float() if isinstance(output, Tensor) and output.is_floating_point() else output

    model.forward = run


def _skip_steps_that_overflowed(optimizer: torch.optim.Optimizer) -> None:
    step = optimizer.step

    @functools.wraps(step)
    def guarded(optimizer: torch.optim.Optimizer, *args: Any, **kwargs: Any) -> Any:  # its step's own
        scaler = _state.unscaled.pop(id(optimizer), None)
        if scaler is None:
            return step(*args, **kwargs)
        found = scaler._found_inf_per_device(optimizer)  # noqa: SLF001  torch has no public query
        result = None if any(float(v) for v in found.values()) else step(*args, **kwargs)
        scaler.update()
        return result

    # A bound method, as schedulers expect that are made later and wrap it once more.
    optimizer.step = types.MethodType(guarded, optimizer)  # type: ignore[method-assign]


@contextmanager
def scale_loss(
    loss: Tensor,
    optimizers: Optimizers,
    loss_id: int = 0,
    model: nn.Module | None = None,
    delay_unscale: bool = False,
    delay_overflow_check: bool = False,
) -> Iterator[Tensor]:
    """Yield the loss to call `backward` on; afterwards gradients are unscaled; an overflow skips the step.

    `delay_unscale=True` in all but the last of several accumulated passes.
    """
    if not _state.scalers:
        raise ConfigError("amp.scale_loss: call amp.initialize first")
    if not 0 <= loss_id < len(_state.scalers):
        raise ConfigError(
            f"amp.scale_loss(loss_id={loss_id}): initialize was told of {len(_state.scalers)} losses"
        )
    scaler = _state.scalers[loss_id]
    yield scaler.scale(loss)
    if delay_unscale or not scaler.is_enabled():
        return
    for optimizer in optimizers if isinstance(optimizers, Sequence) else [optimizers]:
        if id(optimizer) not in _state.unscaled:
            scaler.unscale_(optimizer)
            _state.unscaled[id(optimizer)] = scaler


def master_params(optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """Yield the parameters that the optimizer updates, for instance to clip their gradients."""
    for group in optimizer.param_groups:
        yield from group["params"]


def state_dict(destination: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return every loss scale and how many steps it has not overflowed, as Apex's checkpoints have them.

    `destination`: a dictionary to add them to; default a new one.
    """
    found = {} if destination is None else destination
    for i, scaler in enumerate(_state.scalers):
        held = scaler.state_dict()
        found[f"loss_scaler{i}"] = {
            "loss_scale": held.get("scale", 1.0),
            "unskipped": held.get("_growth_tracker", 0),
        }
    return found


def load_state_dict(state_dict: dict[str, Any]) -> None:
    """Load loss scales, also of a checkpoint that Apex wrote; `initialize` comes first.

    Another number of losses than was saved is a warning.

    Raises:
        ConfigError: A key that names no loss scale.
    """
    unexpected = sorted(k for k in state_dict if not k.startswith("loss_scaler"))
    if unexpected:
        raise ConfigError(f"amp.load_state_dict: keys loss_scaler0, … expected, got {', '.join(unexpected)}")
    if len(state_dict) != len(_state.scalers):
        warnings.warn(
            f"amp.load_state_dict: {len(state_dict)} loss scales are saved and {len(_state.scalers)} in use",
            stacklevel=2,
        )
    for i, scaler in enumerate(_state.scalers):
        saved, held = state_dict.get(f"loss_scaler{i}"), scaler.state_dict()
        if saved and held:
            scaler.load_state_dict(
                {**held, "scale": float(saved["loss_scale"]), "_growth_tracker": int(saved["unskipped"])}
            )
