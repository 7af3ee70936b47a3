"""Batch normalisation with the statistics of several ranks' samples, forward and backward.

Every rank gives count, mean and sum of squared deviations of its own samples; they are merged by Chan's
method, which loses nothing where the mean is large. A rank without samples contributes nothing.

Source: Chan, Golub, LeVeque, Updating Formulae and a Pairwise Algorithm for Computing Sample Variances, 1979.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

# mypy: disable-error-code="no-untyped-call, no-any-return, misc, untyped-decorator"

Context = Any
"""torch's context of an autograd function."""


class Exchange(Protocol):
    """The ranks that share their statistics."""

    def gather(self, own: Tensor) -> Tensor:
        """[n] of every rank as [P, n]."""

    def add_up(self, own: Tensor) -> Tensor:
        """The sum of [n] over the ranks."""

    def factor(self) -> float:
        """P · this rank's share of the loss, by which its gradients are multiplied after backward."""


class Normalise(torch.autograd.Function):
    """(input, weight, bias, eps, exchange, has_samples) -> (output, mean, biased variance, count)."""

    @staticmethod
    def forward(
        ctx: Context,
        input: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        eps: float,
        exchange: Exchange,
        has_samples: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        values = input if input.dtype in (torch.float32, torch.float64) else input.float()
        has_samples = has_samples and input.numel() > 0
        mean, variance, count = _merge(exchange.gather(_own_statistics(values, has_samples)))
        scale = torch.rsqrt(variance + eps).to(values.dtype)
        normal = (values - _wide(mean, input)) * _wide(scale, input)
        ctx.save_for_backward(normal, weight, scale, count)
        ctx.exchange, ctx.has_samples, ctx.dtype = exchange, has_samples, input.dtype
        output = normal
        if weight is not None:
            output = output * _wide(weight, input)
        if bias is not None:
            output = output + _wide(bias, input)
        ctx.mark_non_differentiable(mean, variance, count)
        ctx.set_materialize_grads(False)
        return output.to(input.dtype) if output is not normal else normal.to(input.dtype).clone(), *(
            mean,
            variance,
            count,
        )

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, gradient: Tensor, *unused: Tensor | None) -> Any:
        normal, weight, scale, count = ctx.saved_tensors
        dims = [0, *range(2, normal.dim())]
        gradient = gradient.to(normal.dtype)
        of_bias = gradient.sum(dims) if ctx.needs_input_grad[2] else None
        of_weight = (gradient * normal).sum(dims) if ctx.needs_input_grad[1] else None
        of_input = None
        if ctx.needs_input_grad[0]:
            of_input = _input_gradient(ctx, gradient, normal, weight, scale, count)
        of_weight = None if of_weight is None else of_weight.to(weight.dtype)
        return of_input, of_weight, None if of_bias is None else of_bias.to(weight.dtype), None, None, None


def _input_gradient(
    ctx: Context, gradient: Tensor, normal: Tensor, weight: Tensor | None, scale: Tensor, count: Tensor
) -> Tensor:
    """That of the loss of all ranks, in units of this rank's share of it.

    Ranks differ in their share of the loss: what they tell each other is the gradient times that.
    """
    dims = [0, *range(2, normal.dim())]
    factor = ctx.exchange.factor() if ctx.has_samples else 0.0
    if factor == 0.0:
        own = torch.zeros_like(gradient)
    else:
        own = gradient if weight is None else gradient * _wide(weight, gradient)
        own = own * factor if factor != 1.0 else own
    sums = torch.cat([own.sum(dims), (own * normal).sum(dims)])
    mean, slope = (ctx.exchange.add_up(sums) / count.to(sums.dtype)).chunk(2)
    if factor == 0.0:
        return own.to(ctx.dtype)
    own = (own - _wide(mean, own) - normal * _wide(slope, own)) * _wide(scale, own)
    return (own / factor if factor != 1.0 else own).to(ctx.dtype)


def _own_statistics(values: Tensor, has_samples: bool) -> Tensor:
    """[2·C + 1]: mean, sum of squared deviations, count."""
    channels = values.shape[1]
    if not has_samples:
        return values.new_zeros(2 * channels + 1)
    count = values.numel() // channels
    variance, mean = torch.var_mean(values, [0, *range(2, values.dim())], correction=0)
    return torch.cat([mean, variance * count, values.new_tensor([count])])


def _merge(everyone: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean, biased variance and count of all ranks' samples, from [P, 2·C + 1]."""
    everyone = everyone.double()
    channels = everyone.shape[1] // 2
    means, squares, counts = everyone[:, :channels], everyone[:, channels:-1], everyone[:, -1:]
    count = counts.sum().clamp(min=1)
    mean = (means * (counts / count)).sum(0)
    variance = (squares + counts * (means - mean).square()).sum(0) / count
    return mean, variance, count


def _wide(values: Tensor, like: Tensor) -> Tensor:
    """[C] as [1, C, 1, …]."""
    return values.to(torch.promote_types(like.dtype, torch.float32)).view(1, -1, *[1] * (like.dim() - 2))


def forward(module: Any, input: Tensor, exchange: Exchange, *, has_samples: bool = True) -> Tensor:
    """What a BatchNorm in training mode does, with the samples of all ranks.

    Args:
        module: A `_BatchNorm`; its running statistics are updated as it would.
        input: [N, C, …], different N on different ranks.
        exchange: The ranks.
        has_samples: Whether this rank's samples count.
    """
    normal, mean, variance, count = Normalise.apply(
        input, module.weight, module.bias, module.eps, exchange, has_samples
    )
    if float(count) == 1:
        raise ValueError(
            f"Expected more than 1 value per channel when training, got input size {input.size()}"
        )
    if module.training and module.track_running_stats and module.running_mean is not None:
        _update(module, mean, variance, count)
    return normal


@torch.no_grad()
def _update(module: nn.modules.batchnorm._BatchNorm, mean: Tensor, variance: Tensor, count: Tensor) -> None:
    assert module.running_mean is not None and module.running_var is not None
    assert module.num_batches_tracked is not None
    module.num_batches_tracked.add_(1)
    factor = 1 / float(module.num_batches_tracked) if module.momentum is None else module.momentum
    module.running_mean.lerp_(mean.to(module.running_mean.dtype), factor)
    unbiased = variance * (count / (count - 1))
    module.running_var.lerp_(unbiased.to(module.running_var.dtype), factor)
