"""BatchNorm over the global batch: the workers' sums are added up inside the step.

Forward: the workers' counts, sums and sums of squares are added up in float64, which gives the global mean and
variance. Backward, after Ioffe and Szegedy (2015), section 3: the two sums over the batch that the input's gradient
needs are added up likewise. With one worker the layer computes exactly as torch's own.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode

from shoal.axes.given import HEAD_BYTES
from shoal.comm.table import align
from shoal.kernels import batchnorm

_SIGNATURE = inspect.signature(F.batch_norm)


class GlobalBatchNorm:
    """Makes the BatchNorm layers of a model normalise over all workers that take part in the microbatch in work."""

    def __init__(self, add_up: Callable[[torch.Tensor, Sequence[int]], torch.Tensor] | None = None) -> None:
        # (a small tensor, the replicas that take part) -> its sum over them; may be given later, before the first batch.
        self.add_up = add_up
        self._replicas: Sequence[int] = ()

    def take_over(self, model: nn.Module) -> None:
        """Replace what the BatchNorm layers of a model do."""
        for module in model.modules():
            if isinstance(module, _BatchNorm):
                module.forward = _Forward(module, module.forward, self)  # type: ignore[assignment, method-assign]

    def taking_part(self, replicas: Sequence[int]) -> None:
        """Say which replicas have samples in the microbatch that comes next."""
        self._replicas = replicas

    @property
    def alone(self) -> bool:
        """Whether one worker computes the microbatch in work."""
        return len(self._replicas) < 2

    def batch_sums(self) -> batchnorm.SumSmall | None:
        """What adds up over the workers that take part in the microbatch in work; None where one computes alone."""
        add_up, replicas = self.add_up, self._replicas
        if self.alone:
            return None
        assert add_up is not None
        return lambda values: add_up(values, replicas)

    def normalize(
        self, x: torch.Tensor, weight: Any, bias: Any, averages: batchnorm.Averages, momentum: float, eps: float
    ) -> torch.Tensor:
        sums = self.batch_sums()
        if batchnorm.fits(x, weight):
            return batchnorm.batch_norm(x, weight, bias, averages, momentum, eps, add_up=sums)
        result: torch.Tensor = _Normalize.apply(x, weight, bias, averages, momentum, eps, sums)
        return result


class _Forward:
    """What stands in the place of the forward of a BatchNorm layer."""

    def __init__(self, module: _BatchNorm, plain: Callable[..., Any], over: GlobalBatchNorm) -> None:
        self._module, self._plain, self._over = module, plain, over
        self._is_torchs_own = type(module).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward)
        # For the rewrite that computes a layer together with what follows it.
        self.batch_sums = over.batch_sums

    def __call__(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        module, over = self._module, self._over
        if not module.training or over.alone:
            return self._plain(x, *args, **kwargs)  # type: ignore[no-any-return]
        if not self._is_torchs_own:
            # A subclass may do more than normalise: only what it does by torch's function is replaced.
            with _Instead(over.normalize):
                return self._plain(x, *args, **kwargs)  # type: ignore[no-any-return]
        module._check_input_dim(x)
        averages = (module.running_mean, module.running_var)
        return over.normalize(x, module.weight, module.bias, averages, batchnorm.count_batch(module), module.eps)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Forward:
        # A copy of the layer, say a teacher's that the author's step makes, has weights and averages of its own.
        return _Forward(copy.deepcopy(self._module, memo), copy.deepcopy(self._plain, memo), self._over)

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial, (type(self._module).forward, self._module)


@contextlib.contextmanager
def without_statistics(model: nn.Module) -> Iterator[None]:
    """Let BatchNorm layers compute as in evaluation, for a batch that is nobody's."""
    training = [m for m in model.modules() if isinstance(m, _BatchNorm) and m.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


class _Instead(TorchFunctionMode):
    """While it is active, ``torch.nn.functional.batch_norm`` in training is another function."""

    def __init__(self, normalize: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self._normalize = normalize

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.batch_norm:
            given = _SIGNATURE.bind(*args, **(kwargs or {}))
            given.apply_defaults()
            a = given.arguments
            if a["training"]:
                averages = (a["running_mean"], a["running_var"])
                return self._normalize(a["input"], a["weight"], a["bias"], averages, a["momentum"], a["eps"])
        return func(*args, **(kwargs or {}))


def statistics_bytes(model: nn.Module) -> int:
    """Bytes that one pass through a model's BatchNorm layers exchanges, each layer used once."""
    features = [m.num_features for m in model.modules() if isinstance(m, _BatchNorm)]
    return sum(HEAD_BYTES + align((2 * n + 1) * 8) + HEAD_BYTES + align(2 * n * 8) for n in features)


class _Normalize(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: Any, bias: Any, averages: batchnorm.Averages, momentum: float, eps: float,
        add_up: batchnorm.SumSmall,
    ) -> torch.Tensor:  # fmt: skip
        running_mean, running_var = averages
        channels = x.shape[1]
        count = x.numel() // channels
        var_local, mean_local = torch.var_mean(x, dim=[d for d in range(x.dim()) if d != 1], correction=0)
        mean_local, var_local = mean_local.double(), var_local.double()
        # One exchange: count, sum and sum of squares, in float64 so that nothing is lost by adding squares.
        squares = (var_local + mean_local**2) * count
        sums = torch.cat([mean_local * count, squares, mean_local.new_tensor([float(count)])])
        sums = add_up(sums)
        total = float(sums[-1])
        if total < 2:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {tuple(x.shape)}")
        mean = sums[:channels] / total
        var = (sums[channels : 2 * channels] / total - mean**2).clamp_(min=0)
        inv_std = (var + eps).rsqrt()
        if momentum and running_mean is not None and running_var is not None:
            unbiased = var * (total / (total - 1))
            running_mean.mul_(1 - momentum).add_(mean.to(running_mean.dtype), alpha=momentum)
            running_var.mul_(1 - momentum).add_(unbiased.to(running_var.dtype), alpha=momentum)
        plain_dtype = x.dtype if x.dtype != torch.bfloat16 else torch.float32
        statistics_dtype = weight.dtype if weight is not None else plain_dtype
        mean, var, inv_std = mean.to(statistics_dtype), var.to(statistics_dtype), inv_std.to(statistics_dtype)
        y = torch.nn.functional.batch_norm(x, mean, var, weight, bias, False, 0.0, eps)
        ctx.save_for_backward(x, weight, mean, var, inv_std)
        ctx.total, ctx.add_up, ctx.eps = total, add_up, eps
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        x, weight, mean, var, inv_std = ctx.saved_tensors
        dy = gradients[0]
        # The kernel of the evaluation mode gives the local sums of dy and dy * x_hat as gradients of bias and weight.
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
        affine = (dy_xhat, dy_sum) if weight is not None else (None, None)
        return dx, *affine, None, None, None, None
