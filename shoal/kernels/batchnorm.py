"""BatchNorm in training, an addition and a ReLU behind it as one operator over pictures in channels_last: batchnorm.c.

Written out, each of the three reads and writes the whole picture, forward and backward. Here the forward pass reads it twice and
the backward pass twice. With ``add_up`` the statistics are those of several workers: each adds its sums to the others'.

Forward and backward after Ioffe and Szegedy, "Batch Normalization" (2015), section 3.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from shoal.kernels.build import operators
from shoal.kernels.parallel import cut, run_all
from shoal.kernels.plain import plain_autograd

_NAMES = {torch.float32: "f32", torch.float64: "f64"}
_LAST = torch.channels_last
_FUNCTIONS = {"moments": "PPNNPP", "normalize": "PPPPNNNP", "sums": "PPPPNNPPP", "gradient": "PPPPPPPNNP"}
"""Of each function, which arguments are pointers and which are numbers."""

SumSmall = Callable[[torch.Tensor], torch.Tensor]
Averages = tuple[torch.Tensor | None, torch.Tensor | None]


def fits(x: torch.Tensor, weight: torch.Tensor | None = None) -> bool:
    """Whether the operator in C takes this input: whole vectors of channels, channels last, and autograd in the plain way."""
    if x.dtype not in _NAMES or x.device.type != "cpu" or type(x) not in (torch.Tensor, nn.Parameter) or x.dim() != 4:
        return False
    if not x.numel() or not x.is_contiguous(memory_format=_LAST) or (weight is not None and weight.dtype != x.dtype):
        return False
    if not plain_autograd():
        return False
    library = _library()
    return library is not None and x.shape[1] % library.shoal_batchnorm_lanes(x.dtype.itemsize) == 0


def batch_norm(
    x: torch.Tensor, weight: torch.Tensor | None, bias: torch.Tensor | None, averages: Averages, momentum: float, eps: float,
    more: torch.Tensor | None = None, relu: bool = False, add_up: SumSmall | None = None,
) -> torch.Tensor:  # fmt: skip
    """relu(batch_norm(x) + more) in training, with its gradients, for an x that ``fits``.

    Args:
        averages: the running mean and variance, which are updated with ``momentum``; None where there are none.
        more: what is added before the ReLU, of the same shape.
        add_up: float64 numbers -> their sum over all workers; None where there are no others.

    Raises ValueError where a channel has a single value, as torch does.
    """
    found = _BatchNorm.apply(x, weight, bias, more, averages, momentum, eps, relu, add_up)  # type: ignore[no-untyped-call]
    return found  # type: ignore[no-any-return]


def count_batch(module: Any) -> float:
    """Count the batch and return the weight that it has in the running averages, as torch does."""
    if not module.track_running_stats or module.running_mean is None:
        return 0.0
    assert module.num_batches_tracked is not None
    module.num_batches_tracked.add_(1)
    return 1.0 / float(module.num_batches_tracked) if module.momentum is None else module.momentum


@functools.lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    return operators(Path(__file__).with_suffix(".c"), _FUNCTIONS)


def _place(tensor: torch.Tensor | None, start: int = 0) -> int | None:
    """Where a tensor's samples from ``start`` on are in memory."""
    return None if tensor is None else tensor.data_ptr() + start * tensor.stride(0) * tensor.itemsize


def _function(name: str, x: torch.Tensor) -> Any:
    return getattr(_library(), f"shoal_batchnorm_{name}_{_NAMES[x.dtype]}")


def _in_pieces(x: torch.Tensor, compute: Callable[[int, int, int], None]) -> None:
    """Call compute(piece, first sample, rows of channels) for pieces of the batch at the same time."""
    pixels = x.shape[2] * x.shape[3]
    run_all(
        [functools.partial(compute, k, start, (stop - start) * pixels) for k, (start, stop) in enumerate(cut(len(x)))]
    )


def _moments(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The mean and the variance of each channel, in float64."""
    channels = x.shape[1]
    first = x.detach()[0, :, 0, 0].contiguous()
    sums = torch.zeros((len(cut(len(x))), 2, channels), dtype=torch.float64)
    function = _function("moments", x)
    _in_pieces(
        x, lambda k, at, rows: function(
            _place(x, at), _place(first), rows, channels, _place(sums[k, 0]), _place(sums[k, 1])
        ),
    )  # fmt: skip
    distance, squares = sums.sum(0) / (x.numel() // channels)
    return first + distance, (squares - distance**2).clamp_(min=0)


def _empty(x: torch.Tensor) -> torch.Tensor:
    return torch.empty(x.shape, dtype=x.dtype, memory_format=_LAST)


def _normalize(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, more: torch.Tensor | None, relu: bool) -> torch.Tensor:
    y, function = _empty(x), _function("normalize", x)
    _in_pieces(
        x, lambda _, at, rows: function(
            _place(x, at), _place(scale), _place(shift), _place(more, at), relu, rows, x.shape[1], _place(y, at)
        ),
    )  # fmt: skip
    return y


def _sums(
    x: torch.Tensor, gradient: torch.Tensor, output: torch.Tensor | None, mean: torch.Tensor, let: torch.Tensor | None
) -> torch.Tensor:
    """(2, channels): the sums of the gradient and of its products with x - mean, in float64."""
    channels = x.shape[1]
    sums = torch.zeros((len(cut(len(x))), 2, channels), dtype=torch.float64)
    function = _function("sums", x)
    _in_pieces(
        x, lambda k, at, rows: function(
            _place(x, at), _place(gradient, at), _place(output, at), _place(mean), rows, channels, _place(let, at),
            _place(sums[k, 0]), _place(sums[k, 1]),
        ),
    )  # fmt: skip
    return sums.sum(0)


def _gradient(
    x: torch.Tensor, gradient: torch.Tensor, output: torch.Tensor | None, factors: tuple[torch.Tensor, ...]
) -> torch.Tensor:
    out, function = _empty(x), _function("gradient", x)
    places = [_place(factor) for factor in factors]
    _in_pieces(
        x, lambda _, at, rows: function(
            _place(x, at), _place(gradient, at), _place(output, at), *places, rows, x.shape[1], _place(out, at)
        ),
    )  # fmt: skip
    return out


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: Any, bias: Any, more: torch.Tensor | None, averages: Averages, momentum: float,
        eps: float, relu: bool, add_up: SumSmall | None,
    ) -> torch.Tensor:  # fmt: skip
        channels = x.shape[1]
        mean, var = _moments(x)
        total = float(x.numel() // channels)
        if add_up is not None:
            # One exchange: sums, sums of squares and the count.
            sums = add_up(torch.cat([mean * total, (var + mean**2) * total, mean.new_tensor([total])]))
            total = float(sums[-1])
            mean = sums[:channels] / total
            var = (sums[channels:-1] / total - mean**2).clamp_(min=0)
        if total < 2:
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {tuple(x.shape)}")
        for average, value in zip(averages, (mean, var * (total / (total - 1))), strict=True):
            if momentum and average is not None:
                average.mul_(1 - momentum).add_(value.to(average.dtype), alpha=momentum)
        inv_std = (var + eps).rsqrt()
        scale = inv_std if weight is None else inv_std * weight.detach()
        shift = -mean * scale if bias is None else bias.detach() - mean * scale
        added = None if more is None else more.detach().contiguous(memory_format=_LAST)
        y = _normalize(x, scale.to(x.dtype), shift.to(x.dtype), added, relu)
        ctx.save_for_backward(x, weight, bias, y if relu else None, mean, inv_std)
        ctx.how = total, eps, relu, add_up
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        x, weight, _, y, mean, inv_std = ctx.saved_tensors
        total, _, _, add_up = ctx.how
        if torch.is_grad_enabled():
            return _differentiable(ctx, gradients[0])
        gradient = gradients[0].contiguous(memory_format=_LAST)
        with_more = ctx.needs_input_grad[3]
        let = _empty(x) if with_more and y is not None else None
        rounded = mean.to(x.dtype)
        own = _sums(x, gradient, y, rounded, let)
        if with_more and let is None:
            let = gradient
        own[1] *= inv_std
        for_bias, for_weight = own
        for_x = None
        if ctx.needs_input_grad[0]:
            mean_gradient, mean_product = (own if add_up is None else add_up(own.flatten()).view_as(own)) / total
            factor = inv_std if weight is None else inv_std * weight
            slope = -factor * inv_std * mean_product
            factors = (rounded, *(values.to(x.dtype) for values in (factor, slope, -factor * mean_gradient)))
            for_x = _gradient(x, gradient if let is None else let, y if let is None else None, factors)
        elif add_up is not None:
            add_up(own.flatten())
        affine = (None, None) if weight is None else (for_weight.to(x.dtype), for_bias.to(x.dtype))
        return for_x, *affine, let, None, None, None, None, None


def _differentiable(ctx: Any, gradient: torch.Tensor) -> tuple[Any, ...]:
    """The gradients as a graph of torch's own operations, for those who differentiate them once more."""
    x, weight, bias, y, _, _ = ctx.saved_tensors
    _, eps, relu, add_up = ctx.how
    if add_up is not None:
        raise RuntimeError(
            "BatchNorm over the samples of several workers has no second derivatives; write batchnorm=local in the plan."
        )
    if relu:
        gradient = torch.where(y.detach() <= 0, 0.0, gradient)
    given: list[Any] = [None if t is None else t.view_as(t) for t in (x, weight, bias)]
    again = functional.batch_norm(given[0], None, None, given[1], given[2], True, 0.0, eps)
    asked = [t for t, needed in zip(given, ctx.needs_input_grad, strict=False) if t is not None and needed]
    found = iter(torch.autograd.grad(again, asked, gradient, create_graph=True) if asked else ())
    own = [next(found) if t is not None and needed else None for t, needed in zip(given, ctx.needs_input_grad, strict=False)]
    return *own, gradient if ctx.needs_input_grad[3] else None, None, None, None, None, None
