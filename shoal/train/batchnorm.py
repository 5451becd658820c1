"""BatchNorm over the global batch: the workers' sums are added up inside the step.

Forward, after Chan, Golub and LeVeque (1979): from each worker's count, mean and centred sum of squares the global mean
and variance are combined. Backward, after Ioffe and Szegedy (2015), section 3: the two sums over the batch that the input's
gradient needs are added up likewise. With one worker the layer computes exactly as torch's own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

SumSmall = Callable[[torch.Tensor], torch.Tensor]


class GlobalBatchNorm:
    """Makes the BatchNorm layers of a model normalise over all workers that take part in the microbatch in work."""

    def __init__(self, model: nn.Module, sum_small: Callable[[torch.Tensor, Sequence[int]], torch.Tensor]) -> None:
        self._sum_small = sum_small
        self._ranks: Sequence[int] = ()
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.forward = self._forward_of(module)  # type: ignore[method-assign]

    def taking_part(self, ranks: Sequence[int]) -> None:
        """Say which ranks have samples in the microbatch that comes next."""
        self._ranks = ranks

    def _forward_of(self, module: _BatchNorm) -> Callable[[torch.Tensor], torch.Tensor]:
        plain = module.forward

        def forward(x: torch.Tensor) -> torch.Tensor:
            if not module.training or len(self._ranks) < 2:
                return plain(x)  # type: ignore[no-any-return]
            module._check_input_dim(x)
            ranks = self._ranks
            momentum = _count_batch(module)
            result: torch.Tensor = _Normalize.apply(
                x, module.weight, module.bias, module, momentum, lambda values: self._sum_small(values, ranks)
            )
            return result

        return forward


def statistics_bytes(model: nn.Module) -> int:
    """Bytes that one pass through a model's BatchNorm layers exchanges, each layer used once."""
    features = [m.num_features for m in model.modules() if isinstance(m, _BatchNorm)]
    return sum((2 * n + 1) * 8 + 64 + 2 * n * 8 + 64 for n in features)


def _count_batch(module: _BatchNorm) -> float:
    """Count the batch and return the weight that it has in the running averages, as torch does."""
    if not module.track_running_stats or module.running_mean is None:
        return 0.0
    assert module.num_batches_tracked is not None
    module.num_batches_tracked.add_(1)
    return 1.0 / float(module.num_batches_tracked) if module.momentum is None else module.momentum


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: Any, bias: Any, module: _BatchNorm, momentum: float, add_up: SumSmall
    ) -> torch.Tensor:
        channels = x.shape[1]
        count = x.numel() // channels
        var_local, mean_local = torch.var_mean(x, dim=[d for d in range(x.dim()) if d != 1], correction=0)
        mean_local, var_local = mean_local.double(), var_local.double()
        # One exchange: count, sum and sum of squares, in float64 so that nothing is lost by adding squares.
        sums = torch.cat([mean_local * count, (var_local + mean_local**2) * count, mean_local.new_tensor([float(count)])])
        sums = add_up(sums)
        total = float(sums[-1])
        mean = sums[:channels] / total
        var = (sums[channels : 2 * channels] / total - mean**2).clamp_(min=0)
        inv_std = (var + module.eps).rsqrt()
        if momentum and module.running_mean is not None and module.running_var is not None:
            if total < 2:
                raise ValueError(f"Expected more than 1 value per channel when training, got input size {tuple(x.shape)}")
            unbiased = var * (total / (total - 1))
            module.running_mean.mul_(1 - momentum).add_(mean.to(module.running_mean.dtype), alpha=momentum)
            module.running_var.mul_(1 - momentum).add_(unbiased.to(module.running_var.dtype), alpha=momentum)
        statistics_dtype = weight.dtype if weight is not None else (x.dtype if x.dtype != torch.bfloat16 else torch.float32)
        mean, var, inv_std = mean.to(statistics_dtype), var.to(statistics_dtype), inv_std.to(statistics_dtype)
        y = torch.nn.functional.batch_norm(x, mean, var, weight, bias, False, 0.0, module.eps)
        ctx.save_for_backward(x, weight, mean, var, inv_std)
        ctx.total, ctx.add_up, ctx.eps = total, add_up, module.eps
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        x, weight, mean, var, inv_std = ctx.saved_tensors
        dy = gradients[0]
        # The kernel of the evaluation mode gives the local sums of dy and of dy * x_hat as gradients of bias and weight.
        scale = weight if weight is not None else torch.ones_like(mean)
        dx, dy_xhat, dy_sum = torch.ops.aten.native_batch_norm_backward(
            dy, x, scale, mean, var, mean, inv_std, False, ctx.eps, [True, True, True]
        )
        sums = ctx.add_up(torch.cat([dy_sum.double(), dy_xhat.double()])) / ctx.total
        mean_dy, mean_dy_xhat = sums.chunk(2)
        # dx = w * inv_std * (dy - mean(dy) - x_hat * mean(dy * x_hat)), with x_hat = (x - mean) * inv_std.
        factor = scale.double() * inv_std.double()
        slope = -(factor * inv_std.double() * mean_dy_xhat)
        shift = -(factor * mean_dy) - slope * mean.double()
        shape = [1, -1] + [1] * (x.dim() - 2)
        dx = dx + torch.addcmul(shift.to(dx.dtype).view(shape), x.to(dx.dtype), slope.to(dx.dtype).view(shape))
        return dx, dy_xhat if weight is not None else None, dy_sum if weight is not None else None, None, None, None
