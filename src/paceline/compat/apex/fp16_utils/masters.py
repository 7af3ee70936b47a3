"""Float32 master parameters beside a model's own, and what is copied between them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from paceline.errors import ConfigError
from paceline.train.modules.flat_tensors import unflatten


def master_of(parameter: Tensor) -> Tensor:
    """Return a float32 copy of a parameter, which trains in its place."""
    return parameter.detach().to(torch.float32, copy=True).requires_grad_()


def prep_param_lists(model: nn.Module, flat_master: bool = False) -> tuple[list[Tensor], list[Tensor]]:
    """Return the model's parameters that train, and float32 copies of them for the optimizer.

    Args:
        model: Its parameters are left as they are.
        flat_master: One flat copy of all; they must have one dtype then. Default: one copy each.

    Raises:
        ConfigError: `flat_master` with parameters of several dtypes, or without any.
    """
    parameters: list[Tensor] = [p for p in model.parameters() if p.requires_grad]
    if not flat_master:
        return parameters, [master_of(p) for p in parameters]
    dtypes = sorted({str(p.dtype) for p in parameters})
    if len(dtypes) != 1:
        raise ConfigError(
            f"prep_param_lists(flat_master=True): parameters of one dtype expected, got "
            f"{', '.join(dtypes) or 'none'}; use flat_master=False or FP16_Optimizer"
        )
    flat = nn.Parameter(torch.cat([p.detach().reshape(-1) for p in parameters]).float())
    flat.grad = torch.zeros_like(flat)
    return parameters, [flat]


@torch.no_grad()
def model_grads_to_master_grads(
    model_params: Sequence[Tensor], master_params: Sequence[Tensor], flat_master: bool = False
) -> None:
    """Copy gradients of the model to the masters; a parameter without one leaves its master without one.

    `flat_master` as it was given to `prep_param_lists`: then every parameter needs a gradient.
    """
    if flat_master:
        missing = sum(p.grad is None for p in model_params)
        if missing:
            raise ConfigError(
                f"model_grads_to_master_grads(flat_master=True): {missing} parameters have no gradient; use "
                "flat_master=False"
            )
        flat = torch.cat([p.grad.reshape(-1) for p in model_params if p.grad is not None]).float()
        master_params[0].grad = flat
        return
    for model, master in zip(model_params, master_params, strict=True):
        if model.grad is None:
            master.grad = None
        elif master.grad is None:
            master.grad = model.grad.to(master.dtype, copy=True)
        else:
            master.grad.copy_(model.grad)


def master_params_to_model_params(
    model_params: Sequence[Tensor], master_params: Sequence[Tensor], flat_master: bool = False
) -> None:
    """Copy the masters' values to the model; `flat_master` as it was given to `prep_param_lists`."""
    if flat_master:
        unflatten(master_params[0], model_params)
        return
    with torch.no_grad():
        for model, master in zip(model_params, master_params, strict=True):
            model.copy_(master.view(model.shape))


def to_python_float(t: Tensor | Sequence[float]) -> float:
    """Return a tensor of one element, or the first of a sequence, as a number."""
    return float(t.item()) if isinstance(t, Tensor) else float(t[0])
