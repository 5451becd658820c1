"""A chain of small linear layers, with or without ReLUs behind them, as one operator: perceptron.c.

Written out, each layer is three matrix products, a sum and two passes over its output, and between them a dozen calls that take
longer than what they compute. Here the rows of a batch go through all layers while they are in the nearest cache.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from shoal.kernels.build import operators
from shoal.kernels.parallel import cut, run_all
from shoal.kernels.plain import plain_autograd

_NAMES = {torch.float32: "f32", torch.float64: "f64"}
_FUNCTIONS = {"forward": "PNNNNPPPPPPP", "backward": "PNNNNPPPPPPPPPP"}
"""Of each function, which arguments are pointers and which are numbers."""
_BLOCK = 48

Layer = tuple[torch.Tensor, "torch.Tensor | None", bool]
"""A weight (outputs, inputs), a bias, and whether a ReLU follows."""


def fits(x: torch.Tensor, layers: Sequence[Layer]) -> bool:
    """Whether the operator in C takes this input: rows of numbers next to each other, and autograd in the plain way."""
    if type(x) not in (torch.Tensor, nn.Parameter) or x.dim() != 2 or x.dtype not in _NAMES or x.device.type != "cpu":
        return False
    if not x.numel() or x.shape[1] != layers[0][0].shape[1] or not x.is_contiguous():
        return False
    for weight, bias, _ in layers:
        if weight.dtype != x.dtype or not weight.is_contiguous() or (bias is not None and bias.dtype != x.dtype):
            return False
    return plain_autograd() and _library() is not None


def perceptron(x: torch.Tensor, layers: Sequence[Layer]) -> torch.Tensor:
    """What the layers make of x (rows, inputs), one after the other, with its gradients, for an x that ``fits``."""
    flat = [tensor for weight, bias, _ in layers for tensor in (weight, bias)]
    found = _Perceptron.apply(x, tuple(relu for _, _, relu in layers), *flat)  # type: ignore[no-untyped-call]
    return found  # type: ignore[no-any-return]


@functools.lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    return operators(Path(__file__).with_suffix(".c"), _FUNCTIONS)


@functools.cache
def _padded(dtype: torch.dtype, sizes: tuple[int, ...]) -> tuple[int, ...]:
    lanes = _library().shoal_perceptron_lanes(dtype.itemsize)  # type: ignore[union-attr]
    return tuple(-(-size // lanes) * lanes for size in sizes)


@functools.cache
def _numbers(values: tuple[int, ...]) -> Any:
    return (ctypes.c_int64 * len(values))(*values)


def _pointers(tensors: Sequence[torch.Tensor | None]) -> Any:
    return (ctypes.c_void_p * len(tensors))(*(None if tensor is None else tensor.data_ptr() for tensor in tensors))


def _flat(sizes: Sequence[int], others: Sequence[int]) -> int:
    return sum(a * b for a, b in zip(sizes, others, strict=True))


class _Perceptron(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, relu: tuple[bool, ...], *flat: Any) -> torch.Tensor:
        weights, biases, rows = flat[::2], flat[1::2], len(x)
        sizes = (x.shape[1], *(len(weight) for weight in weights))
        wide = _padded(x.dtype, sizes)
        y, kept = x.new_empty(rows, sizes[-1]), x.new_empty(rows * sum(wide[1:-1]))
        room = _flat(sizes[:-1], wide[1:]) + _BLOCK * wide[-1]
        function = getattr(_library(), f"shoal_perceptron_forward_{_NAMES[x.dtype]}")
        shape = len(weights), _numbers(sizes), _pointers(weights), _pointers(biases), _numbers(relu)

        def compute(start: int, stop: int) -> None:
            own = x.new_empty(room)
            function(x.data_ptr(), rows, start, stop, *shape, kept.data_ptr(), y.data_ptr(), own.data_ptr())

        run_all([functools.partial(compute, start, stop) for start, stop in cut(rows)])
        # Its own output only where a ReLU comes last: others may be changed in place, as torch's may.
        ctx.save_for_backward(x, y if relu[-1] else None, kept, *flat)
        ctx.relu = relu
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        x, y, kept, *flat = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _differentiable(ctx, x, flat, gradients[0])
        weights, rows, gradient = flat[::2], len(x), gradients[0].contiguous()
        sizes = (x.shape[1], *(len(weight) for weight in weights))
        wide = _padded(x.dtype, sizes)
        for_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        room = 2 * _flat(wide[:-1], sizes[1:]) + 3 * _BLOCK * max(wide)
        function = getattr(_library(), f"shoal_perceptron_backward_{_NAMES[x.dtype]}")
        shape = len(weights), _numbers(sizes), _pointers(weights)
        asked = ctx.needs_input_grad[2:]

        def compute(start: int, stop: int, made: Sequence[torch.Tensor | None]) -> None:
            own = x.new_empty(room)
            places = [None if t is None else t.data_ptr() for t in (kept, y, gradient, for_x)]
            sums = _pointers(made[::2]), _pointers(made[1::2])
            function(x.data_ptr(), rows, start, stop, *shape, *sums, _numbers(ctx.relu), *places, own.data_ptr())

        pieces = cut(rows)
        # Each piece adds up on its own, and the pieces in order: so the bits do not depend on who is early.
        parts = [[torch.empty_like(t) if ask else None for t, ask in zip(flat, asked, strict=True)] for _ in pieces]
        run_all([functools.partial(compute, *piece, own) for piece, own in zip(pieces, parts, strict=True)])
        for own in parts[1:]:
            for total, part in zip(parts[0], own, strict=True):
                if total is not None and part is not None:
                    total += part
        return for_x, None, *parts[0]


def _differentiable(ctx: Any, x: torch.Tensor, flat: Sequence[Any], gradient: torch.Tensor) -> tuple[Any, ...]:
    """The gradients as a graph of torch's own operations, for those who differentiate them once more."""
    given: list[Any] = [None if tensor is None else tensor.view_as(tensor) for tensor in (x, *flat)]
    out = given[0]
    for weight, bias, relu in zip(given[1::2], given[2::2], ctx.relu, strict=True):
        out = F.linear(out, weight, bias)
        out = F.relu(out) if relu else out
    needed = (ctx.needs_input_grad[0], *ctx.needs_input_grad[2:])
    wanted = [tensor for tensor, need in zip(given, needed, strict=True) if need]
    found = iter(torch.autograd.grad(out, wanted, gradient, create_graph=True))
    first, *rest = [next(found) if need else None for need in needed]
    return first, None, *rest
