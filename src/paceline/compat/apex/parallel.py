"""`apex.parallel`: DistributedDataParallel, synchronised batch normalisation, reduction by hand."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from paceline.compat.apex.larc import LARC
from paceline.errors import ConfigError
from paceline.train.modules.flat_tensors import flattened, unflatten

__all__ = [
    "LARC",
    "DistributedDataParallel",
    "Reducer",
    "SyncBatchNorm",
    "convert_syncbn_model",
    "create_syncbn_process_group",
]
SyncBatchNorm = nn.SyncBatchNorm


class DistributedDataParallel(nn.parallel.DistributedDataParallel):
    """torch's DistributedDataParallel under Apex's arguments.

    `message_size` (elements) sets the bucket size; `delay_allreduce` and stream options have no meaning here.
    """

    def __init__(
        self,
        module: nn.Module,
        message_size: int = 10_000_000,
        delay_allreduce: bool = False,
        shared_param: bool | None = None,
        allreduce_trigger_params: object = None,
        retain_allreduce_buffers: bool = False,
        allreduce_always_fp32: bool = False,
        num_allreduce_streams: int = 1,
        allreduce_communicators: object = None,
        gradient_average: bool = True,
        gradient_predivide_factor: float = 1.0,
        **kwargs: Any,  # DistributedDataParallel's own, of many types
    ) -> None:
        if not gradient_average:
            raise NotImplementedError("gradient_average=False: scale the loss by the world size instead")
        if shared_param is not None or allreduce_trigger_params is not None:
            warnings.warn("shared_param and allreduce_trigger_params have no effect", stacklevel=2)
        device = next((p.device for p in module.parameters()), torch.device("cpu"))
        ids = [device.index] if device.type == "cuda" else None
        megabytes = max(1, message_size * 4 // (1 << 20))
        super().__init__(module, device_ids=ids, bucket_cap_mb=megabytes, **kwargs)


def convert_syncbn_model(
    module: nn.Module, process_group: dist.ProcessGroup | None = None, channel_last: bool = False
) -> nn.Module:
    """Replace batch normalisation by its synchronised form."""
    converted: nn.Module = nn.SyncBatchNorm.convert_sync_batchnorm(  # type: ignore[no-untyped-call]
        module, process_group
    )
    return converted


def create_syncbn_process_group(group_size: int) -> dist.ProcessGroup | None:
    """Form groups of neighbouring ranks for synchronised batch normalisation; every rank calls it.

    Args:
        group_size: Ranks of each group; it divides the world size. 0: all ranks.

    Returns:
        The group of this rank; None for 0, which means all ranks.

    Raises:
        ConfigError: The world size does not divide by it.
    """
    if group_size == 0:
        return None
    size = dist.get_world_size()
    if group_size < 0 or size % group_size:
        raise ConfigError(
            f"create_syncbn_process_group({group_size}): a divisor of the {size} ranks expected, or 0 for all"
        )
    own: dist.ProcessGroup
    own, _ = dist.new_subgroups(group_size)  # type: ignore[no-untyped-call]
    return own


class GradientAverager:
    """Averages gradients over the ranks when `reduce` is called, and not before; Apex's `Reducer`.

    Args:
        module_or_grads_list: A module, whose parameters become those of rank 0 at once; or gradients, also in
            nested lists.
    """

    def __init__(self, module_or_grads_list: nn.Module | Iterable[Any]) -> None:
        self.module: nn.Module | None = None
        self.grads: list[Tensor] = []
        if isinstance(module_or_grads_list, nn.Module):
            self.module = module_or_grads_list
            for flat, parts in flattened(self.module.parameters()):
                dist.broadcast(flat, 0)
                unflatten(flat, parts)
        else:
            self.grads = list(_tensors(module_or_grads_list))

    def reduce(self) -> None:
        """Replace the gradients by their average; ranks must have gradients for the same parameters."""
        grads = self.grads
        if self.module is not None:
            grads = [p.grad for p in self.module.parameters() if p.grad is not None]
        for flat, parts in flattened(grads):
            dist.all_reduce(flat)
            flat /= dist.get_world_size()
            unflatten(flat, parts)


Reducer = GradientAverager


def _tensors(values: Iterable[Any]) -> Iterable[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        else:
            yield from _tensors(value)
