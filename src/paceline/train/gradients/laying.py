"""A gradient's way into the flat buffer that its bucket is sent from."""

from __future__ import annotations

import torch

from paceline.errors import ConfigError
from paceline.train.gradients.scaling import scale
from paceline.train.replica import FlatReplica


def lay(replica: FlatReplica, index: int, parameter: torch.Tensor, graphs: dict[int, torch.Tensor]) -> None:
    """Move a gradient into its place in the flat buffer, times this rank's weight.

    Args:
        replica: The model.
        index: Of the parameter among those trained.
        parameter: It; its gradient becomes a view of the buffer.
        graphs: Gets the gradient if that has a graph (`backward(create_graph=True)`).

    Raises:
        ConfigError: The gradient is sparse.
    """
    gradient, weight = parameter.grad, replica.weight
    view = replica.place_of_gradient(index, gradient)
    if gradient is not None and gradient.requires_grad:
        graphs[index] = gradient
        gradient = gradient.detach()
    if gradient is None or weight == 0.0:
        view.zero_()  # not 0 · gradient: a repeated batch may have given NaN
    elif gradient is view:
        view.mul_(weight)
    elif gradient.layout is not torch.strided:
        raise ConfigError(
            f"the gradient of {replica.name(parameter)} is sparse ({gradient.layout}), which the"
            " all_reduce of dense buckets cannot send; use sparse=False, or strategy='local_sgd(...)'"
        )
    else:
        scale(view, gradient, weight)
    if gradient is not None:
        parameter.grad = view
