"""Models whose parameters are float16, except those of batch normalisation."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


class tofp16(nn.Module):
    """Casts its input to float16."""

    def forward(self, input: Tensor) -> Tensor:
        return input.half()


def BN_convert_float(module: nn.Module) -> nn.Module:
    """Cast batch normalisation with a weight back to float32, in `module` and below; returns `module`."""
    for part in module.modules():
        if _keeps_float32(part):
            part.float()
    return module


def network_to_half(network: nn.Module) -> nn.Sequential:
    """Return the network in float16, batch normalisation in float32, behind a cast of its input."""
    return nn.Sequential(tofp16(), BN_convert_float(network.half()))


def convert_module(module: nn.Module, dtype: torch.dtype) -> None:
    """Cast the module's own parameters, their gradients and its buffers; not those of its parts."""
    for parameter in module.parameters(recurse=False):
        if parameter.is_floating_point():
            parameter.data = parameter.data.to(dtype)
            if parameter.grad is not None:
                parameter.grad.data = parameter.grad.data.to(dtype)
    for buffer in module.buffers(recurse=False):
        if buffer.is_floating_point():
            buffer.data = buffer.data.to(dtype)


def convert_network(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast parameters and buffers except those of batch normalisation with a weight; returns `network`."""
    for module in network.modules():
        if not _keeps_float32(module):
            convert_module(module, dtype)
            if isinstance(module, nn.RNNBase):
                module.flatten_parameters()
    return network


class FP16Model(nn.Module):
    """A network in float16, batch normalisation in float32, whose inputs are cast.

    Args:
        network: The network, which is changed.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = convert_network(network, dtype=torch.float16)

    def forward(self, *inputs: Tensor) -> Any:  # the network's own
        return self.network(*(x.half() for x in inputs))


def _keeps_float32(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and module.affine
