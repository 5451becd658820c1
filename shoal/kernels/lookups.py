"""Rows of several embedding tables by the same numbers, in one call: lookups.c.

torch looks each table up by itself, row by row through a general copy, and what is done with the rows (sums over a sample, say)
is an operation more. The gradients are those of torch's own operator for each table.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shoal.kernels.build import operators
from shoal.kernels.plain import plain_autograd

_NAMES = {torch.float32: "f32", torch.float64: "f64"}
_FUNCTIONS = {"gather": "NPPPPPPNNP"}
_PLAIN = (torch.Tensor, nn.Parameter)
_MOST_NUMBERS = 1 << 16
"""More than these are better shared among threads, where there are several."""


How = tuple[tuple[int, bool], ...]
"""Of each table the number of the row that has no gradient (-1 where all have one), and whether not the rows are wanted, but for
each sample the sum of all numbers in its rows."""


def fits(ids: torch.Tensor, weights: Sequence[torch.Tensor]) -> bool:
    """Whether the operator in C takes these: whole numbers in a batch, and tables (rows, width) in memory as they look."""
    count = ids.numel()
    if type(ids) is not torch.Tensor or ids.dtype != torch.int64 or ids.device.type != "cpu" or not ids.dim() or not count:
        return False
    dtype = weights[0].dtype
    if dtype not in _NAMES:
        return False
    numbers = 0
    for weight in weights:
        if type(weight) not in _PLAIN or weight.dtype != dtype or weight.device.type != "cpu" or not weight.is_contiguous():
            return False
        numbers += count * weight.shape[1]
    if numbers > _MOST_NUMBERS and torch.get_num_threads() > 1:
        return False
    return numbers > 0 and plain_autograd() and _library() is not None


def lookups(ids: torch.Tensor, weights: Sequence[torch.Tensor], how: How) -> tuple[torch.Tensor, ...]:
    """Of each table its rows (*ids.shape, width), or their sums (samples,), with their gradients; for what ``fits``.

    IndexError where there is no such row.
    """
    found = _Lookups.apply(ids, how, *weights)  # type: ignore[no-untyped-call]
    return found  # type: ignore[no-any-return]


@functools.lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    return operators(Path(__file__).with_suffix(".c"), _FUNCTIONS)


class _Shape:
    """What is the same at every call: sizes as C takes them, and its function."""

    def __init__(self, dtype: torch.dtype, sizes: tuple[tuple[int, ...], ...], how: How) -> None:
        count = len(sizes)
        numbers, self.pointers = ctypes.c_int64 * count, ctypes.c_void_p * count
        self.widths, self.counts = [width for _, width in sizes], [rows for rows, _ in sizes]
        self.tables = count
        self.given = numbers(*self.widths), numbers(*self.counts), numbers(*[summed for _, summed in how])
        self.gather = getattr(_library(), f"shoal_lookups_gather_{_NAMES[dtype]}")


_shape = functools.cache(_Shape)


class _Lookups(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, ids: torch.Tensor, how: How, *weights: torch.Tensor) -> tuple[torch.Tensor, ...]:
        dtype, own, size = weights[0].dtype, ids.contiguous(), ids.shape
        shape = _shape(dtype, tuple([tuple(weight.shape) for weight in weights]), how)
        samples = size[0]
        outs = [
            torch.empty((samples,) if summed else (*size, width), dtype=dtype)
            for width, (_, summed) in zip(shape.widths, how, strict=True)
        ]
        wrong = ctypes.c_int64(0)
        shape.gather(
            shape.tables, shape.pointers(*[weight.data_ptr() for weight in weights]), *shape.given,
            shape.pointers(*[out.data_ptr() for out in outs]), own.data_ptr(), samples, own.numel() // samples,
            ctypes.addressof(wrong),
        )  # fmt: skip
        if wrong.value:
            raise IndexError("index out of range in self")
        ctx.save_for_backward(own)
        ctx.how, ctx.shape = how, shape
        ctx.set_materialize_grads(False)
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor | None) -> tuple[Any, ...]:
        (ids,) = ctx.saved_tensors
        shape, found = ctx.shape, [None, None]
        for gradient, (padding, summed), count, width, asked in zip(
            gradients, ctx.how, shape.counts, shape.widths, ctx.needs_input_grad[2:], strict=True
        ):
            if gradient is None or not asked:
                found.append(None)
                continue
            if summed:
                gradient = gradient.view(-1, *[1] * ids.dim()).expand(*ids.shape, width)
            found.append(torch.ops.aten.embedding_dense_backward(gradient, ids, count, padding, False))
        return tuple(found)
