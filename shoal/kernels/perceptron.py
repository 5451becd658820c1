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
_PLAIN = (torch.Tensor, nn.Parameter)

Layer = tuple[torch.Tensor, "torch.Tensor | None", bool]
"""A weight (outputs, inputs), a bias, and whether a ReLU follows."""


def fits(x: torch.Tensor, layers: Sequence[Layer]) -> bool:
    """Whether the operator in C takes this input: rows of numbers next to each other, and autograd in the plain way."""
    if type(x) not in _PLAIN or x.dim() != 2 or x.dtype not in _NAMES or x.device.type != "cpu":
        return False
    if not x.numel() or x.shape[1] != layers[0][0].shape[1] or not x.is_contiguous():
        return False
    for weight, bias, _ in layers:
        for tensor in (weight, bias):
            if tensor is not None and (type(tensor) not in _PLAIN or tensor.dtype != x.dtype or not tensor.is_contiguous()):
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


class _Shape:
    """What is the same at every call: sizes as C takes them, the room that it needs, and its functions."""

    def __init__(self, dtype: torch.dtype, sizes: tuple[int, ...], relu: tuple[bool, ...]) -> None:
        library: Any = _library()
        lanes = library.shoal_perceptron_lanes(dtype.itemsize)
        wide = [-(-size // lanes) * lanes for size in sizes]
        self.layers = len(relu)
        self.sizes, self.relu = (ctypes.c_int64 * len(sizes))(*sizes), (ctypes.c_int64 * len(relu))(*relu)
        self.pointers = ctypes.c_void_p * len(relu)
        self.kept = sum(wide[1:-1])
        self.forward_room = _dot(sizes[:-1], wide[1:]) + _BLOCK * wide[-1]
        self.backward_room = 2 * _dot(wide[:-1], sizes[1:]) + 3 * _BLOCK * max(wide)
        self.forward = getattr(library, f"shoal_perceptron_forward_{_NAMES[dtype]}")
        self.backward = getattr(library, f"shoal_perceptron_backward_{_NAMES[dtype]}")

    def places(self, tensors: Sequence[torch.Tensor | None]) -> Any:
        return self.pointers(*[None if tensor is None else tensor.data_ptr() for tensor in tensors])


_shape = functools.cache(_Shape)


def _dot(sizes: Sequence[int], others: Sequence[int]) -> int:
    return sum(a * b for a, b in zip(sizes, others, strict=True))


class _Perceptron(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, relu: tuple[bool, ...], *flat: Any) -> torch.Tensor:
        weights, dtype = flat[::2], x.dtype
        rows, inputs = x.shape
        shape = _shape(dtype, (inputs, *[weight.shape[0] for weight in weights]), relu)
        y, kept = torch.empty((rows, shape.sizes[-1]), dtype=dtype), torch.empty(rows * shape.kept, dtype=dtype)
        given = shape.layers, shape.sizes, shape.places(weights), shape.places(flat[1::2]), shape.relu

        def compute(start: int, stop: int) -> None:
            room = torch.empty(shape.forward_room, dtype=dtype)
            shape.forward(x.data_ptr(), rows, start, stop, *given, kept.data_ptr(), y.data_ptr(), room.data_ptr())

        run_all([functools.partial(compute, start, stop) for start, stop in cut(rows)])
        # Its own output only where a ReLU comes last: others may be changed in place, as torch's may.
        ctx.save_for_backward(x, y if relu[-1] else None, kept, *flat)
        ctx.how = relu, shape
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        x, y, kept, *flat = ctx.saved_tensors
        if torch.is_grad_enabled():
            return _differentiable(ctx, x, flat, gradients[0])
        shape, rows, gradient, dtype = ctx.how[1], len(x), gradients[0].contiguous(), x.dtype
        asked = ctx.needs_input_grad
        for_x = torch.empty_like(x) if asked[0] else None
        given = shape.layers, shape.sizes, shape.places(flat[::2])
        places = [None if t is None else t.data_ptr() for t in (kept, y, gradient, for_x)]

        def compute(start: int, stop: int, made: Sequence[torch.Tensor | None]) -> None:
            room = torch.empty(shape.backward_room, dtype=dtype)
            sums = shape.places(made[::2]), shape.places(made[1::2])
            shape.backward(x.data_ptr(), rows, start, stop, *given, *sums, shape.relu, *places, room.data_ptr())

        pieces = cut(rows)
        # Each piece adds up on its own, and the pieces in order: so the bits do not depend on who is early.
        parts = [[torch.empty_like(t) if ask else None for t, ask in zip(flat, asked[2:], strict=True)] for _ in pieces]
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
    for weight, bias, relu in zip(given[1::2], given[2::2], ctx.how[0], strict=True):
        out = F.linear(out, weight, bias)
        out = F.relu(out) if relu else out
    needed = (ctx.needs_input_grad[0], *ctx.needs_input_grad[2:])
    wanted = [tensor for tensor, need in zip(given, needed, strict=True) if need]
    found = iter(torch.autograd.grad(out, wanted, gradient, create_graph=True))
    first, *rest = [next(found) if need else None for need in needed]
    return first, None, *rest
