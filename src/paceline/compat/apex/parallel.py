"""`parallel.DistributedDataParallel` and synchronised batch normalisation, done by torch's own."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

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
