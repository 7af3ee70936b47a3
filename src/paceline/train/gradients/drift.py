"""Whether ranks that sum their gradients took the same steps: otherwise their replicas have drifted apart.

A loop may decide by its own loss whether to step, or a scheduler by which rate. No exchange of gradients
fails then, and each rank goes on with a model of its own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from paceline.comm.spread import of_all_ranks, spread_elements
from paceline.errors import Mismatch
from paceline.train.data.fingerprint import different, digest
from paceline.types import Communicator, named

_TOLERANCE = 1e-3
"""Of the root mean square of the parameters: processors may differ in the last bits of each step."""


def check(
    num_steps: int,
    optimizers: Sequence[torch.optim.Optimizer],
    parameters: Sequence[torch.Tensor],
    comm: Communicator,
) -> None:
    """Compare one model's optimizers and parameters over the ranks. Collective.

    Args:
        num_steps: How often the optimizers stepped on this rank, together.
        optimizers: Those of the model.
        parameters: Flat tensors.
        comm: The ranks.

    Raises:
        Mismatch: On all ranks, if they stepped more or less often than rank 0's, have other settings, or hold
            other parameters.
    """
    settings = [_settings(optimizer) for optimizer in optimizers]
    if others := different(digest([num_steps, settings]), comm):
        rates = ", ".join(str(group.get("lr")) for groups in settings for group in groups)
        raise Mismatch(
            f"rank {comm.rank}: the optimizers of {named(others)} took other steps than rank 0's, or have"
            f" other settings; here: {num_steps} steps, learning rates {rates}. The replicas have drifted"
            " apart. All ranks must decide alike whether to step and how far, as by"
            " job.all_reduce_metrics({'loss': (loss_sum, count)}), not by a loss of their own"
        )
    if others := _elsewhere(parameters, comm):
        raise Mismatch(
            f"rank {comm.rank}: the parameters of {named(others)} are others than rank 0's: the replicas have"
            " drifted apart. The loop changes gradients or parameters by what one rank alone knows: its own"
            " loss or samples, random numbers (each rank draws its own after prepare), a checkpoint that one"
            " rank has loaded. Let all ranks do the same, as by job.all_reduce_metrics or job.set_seed"
        )


def _elsewhere(parameters: Sequence[torch.Tensor], comm: Communicator) -> list[int]:
    """The ranks with other parameters than rank 0's, as far as evenly spread elements tell."""
    rows = of_all_ranks(spread_elements(parameters).nan_to_num(posinf=0.0, neginf=0.0), comm)
    limit = _TOLERANCE * float(rows[0].square().mean().sqrt())
    return [rank for rank, row in enumerate(rows) if float((row - rows[0]).abs().max()) > limit]


def _settings(optimizer: torch.optim.Optimizer) -> list[dict[str, str]]:
    """Numbers of each parameter group, with six digits: hosts may differ in the last bit of a cosine."""
    groups = optimizer.param_groups
    return [{k: f"{float(v):.6g}" for k, v in group.items() if _is_number(v)} for group in groups]


def _is_number(value: object) -> bool:
    is_scalar = isinstance(value, torch.Tensor) and value.numel() == 1
    return isinstance(value, (int, float)) or is_scalar
