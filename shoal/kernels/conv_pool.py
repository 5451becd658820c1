"""Convolution, ReLU and max-pooling of small images as one operator: conv_pool.c, and the same by torch without a compiler.

A convolution of few channels keeps a general library busy with moving numbers about: what it gives is four times as large as
what the pooling lets through, and is written and read several times. Here it never leaves the registers.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.nn.grad import conv2d_input

from shoal.kernels.build import operators
from shoal.kernels.parallel import cut, run_all
from shoal.kernels.plain import plain_autograd

_NAMES = {torch.float32: "f32", torch.float64: "f64"}
_WINDOWS = (1, 2)


def conv_relu_pool(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, padding: tuple[int, int] = (0, 0), relu: bool = True,
    window: int = 2,
) -> torch.Tensor:  # fmt: skip
    """max_pool2d(relu(conv2d(x, weight, bias, padding=padding)), window), with its gradients.

    Args:
        x: (N, C, H, W), of any strides.
        weight: (O, C, kh, kw), contiguous; ``bias``: (O,) or None.
        padding: zeros added around x: rows, columns.
        relu: whether there is one before the pooling.
        window: of the pooling, and its stride; 1 for none.

    Returns (N, O, rows, columns), contiguous in channels_last. Where ``fits`` says no, torch computes it.
    """
    if not fits(x, weight, window):
        return _by_torch(x, weight, bias, padding, relu, window)
    return _ConvPool.apply(x, weight, bias, padding, relu, window)  # type: ignore[no-any-return, no-untyped-call]


def _by_torch(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, padding: tuple[int, int], relu: bool, window: int
) -> torch.Tensor:
    given = functional.conv2d(x, weight, bias, padding=padding)
    # ReLU and maximum may change places: both keep the order.
    pooled = functional.max_pool2d(given, window) if window > 1 else given
    return functional.relu(pooled) if relu else pooled


def fits(x: torch.Tensor, weight: torch.Tensor, window: int) -> bool:
    """Whether the operator in C takes these: its channels are whole vectors, and autograd runs in the plain way."""
    if x.dtype not in _NAMES or weight.dtype != x.dtype or x.device.type != "cpu" or window not in _WINDOWS:
        return False
    if type(x) not in (torch.Tensor, nn.Parameter) or x.dim() != 4 or not x.numel():
        return False
    if not plain_autograd():
        return False
    library = _library()
    return library is not None and weight.shape[0] % library.shoal_conv_pool_lanes(x.dtype.itemsize) == 0


class _Shape(ctypes.Structure):
    """``Shape`` of conv_pool.c."""

    _fields_ = [
        (name, ctypes.c_int64)
        for name in (
            "images", "channels", "kernel_height", "kernel_width", "outputs", "rows", "columns", "window", "relu",
            "image_stride", "channel_stride", "row_stride", "column_stride",
        )
    ]  # fmt: skip


@functools.lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    return operators(Path(__file__).with_suffix(".c"), {"forward": 7 * "P", "backward": 7 * "P", "unpool": 4 * "P"})


@functools.lru_cache(maxsize=64)
def _offsets(channels: int, height: int, width: int, strides: tuple[int, int, int]) -> Any:
    """Of each tap from the first element of its window position, in elements."""
    taps = [
        c * strides[0] + y * strides[1] + x * strides[2] for c in range(channels) for y in range(height) for x in range(width)
    ]
    return (ctypes.c_int64 * len(taps))(*taps)


class _ConvPool(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, padding: tuple[int, int], relu: bool,
        window: int,
    ) -> torch.Tensor:  # fmt: skip
        padded = functional.pad(x, (padding[1], padding[1], padding[0], padding[0])) if any(padding) else x
        outputs, channels, height, width = weight.shape
        rows, columns = (padded.shape[2] - height + 1) // window, (padded.shape[3] - width + 1) // window
        taps = weight.detach().reshape(outputs, -1).t().contiguous()
        added = bias.detach() if bias is not None else x.new_zeros(outputs)
        out = x.new_empty((len(x), rows, columns, outputs))
        where = torch.empty(out.shape, dtype=torch.uint8)
        ctx.made = _Made(padded, (height, width), out, window, relu)
        ctx.made.run("forward", lambda piece: (piece(padded), taps, added, piece(out), piece(where)))
        ctx.save_for_backward(x, padded if any(padding) else x, weight, bias, where)
        ctx.how = padding, relu, window
        return out.permute(0, 3, 1, 2)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, padded, weight, bias, where = ctx.saved_tensors
        if torch.is_grad_enabled():
            # The gradient is to be differentiated once more. x may itself come from the weight: stand-ins keep the two apart.
            given: list[Any] = [t if t is None else t.view_as(t) for t in (x, weight, bias)]
            wanted = [t for t, needed in zip(given, ctx.needs_input_grad, strict=False) if needed]
            found = iter(torch.autograd.grad(_by_torch(*given, *ctx.how), wanted, gradients, create_graph=True))
            return *(next(found) if needed else None for needed in ctx.needs_input_grad[:3]), None, None, None
        gradient = gradients[0].permute(0, 2, 3, 1).contiguous()
        outputs = weight.shape[0]
        for_weight = for_bias = for_x = None
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            sums = [weight.new_zeros((weight[0].numel() + 1, outputs)) for _ in range(ctx.made.pieces)]
            ctx.made.run(
                "backward",
                lambda piece: (piece(padded), piece(gradient), piece(where), (own := sums[piece.index])[:-1], own[-1]),
            )
            total = functools.reduce(torch.add, sums)
            for_weight, for_bias = total[:-1].t().reshape(weight.shape), total[-1] if bias is not None else None
        if ctx.needs_input_grad[0]:
            window = ctx.made.shape.window
            whole = weight.new_empty((len(x), where.shape[1] * window, where.shape[2] * window, outputs))
            ctx.made.run("unpool", lambda piece: (piece(gradient), piece(where), piece(whole)), with_offsets=False)
            # What the windows left over at the edges has no gradient.
            missing = [padded.shape[2 + d] - weight.shape[2 + d] + 1 - whole.shape[1 + d] for d in range(2)]
            whole = functional.pad(whole.permute(0, 3, 1, 2), (0, missing[1], 0, missing[0]))
            for_x = conv2d_input(list(x.shape), weight, whole, padding=ctx.how[0])
        return for_x, for_weight, for_bias, None, None, None


class _Piece:
    """Takes the images of one piece of a batch out of a tensor."""

    def __init__(self, index: int, start: int, stop: int) -> None:
        self.index, self.start, self.stop = index, start, stop

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor[self.start : self.stop]


class _Made:
    """One use of the operator: its sizes, and how the batch is cut among threads."""

    def __init__(self, x: torch.Tensor, kernel: tuple[int, int], out: torch.Tensor, window: int, relu: bool) -> None:
        images, rows, columns, outputs = out.shape
        self.shape = _Shape(images, x.shape[1], *kernel, outputs, rows, columns, window, relu, *x.stride())
        self._offsets = _offsets(x.shape[1], *kernel, x.stride()[1:])
        self._kind = _NAMES[x.dtype]
        self._cuts = [_Piece(k, *bounds) for k, bounds in enumerate(cut(images))]

    @property
    def pieces(self) -> int:
        return len(self._cuts)

    def run(
        self, name: str, arguments: Callable[[_Piece], Sequence[torch.Tensor]], with_offsets: bool = True
    ) -> None:
        """Call a function of the library for each piece; ``arguments`` gives the tensors for one."""
        function = getattr(_library(), f"shoal_conv_pool_{name}_{self._kind}")
        calls = []
        for piece in self._cuts:
            # By value: pieces differ in how many images they have.
            shape = _Shape.from_buffer_copy(self.shape)
            shape.images = piece.stop - piece.start
            tensors = arguments(piece)
            first = (self._offsets,) if with_offsets else ()
            calls.append(functools.partial(function, ctypes.byref(shape), *first, *(t.data_ptr() for t in tensors)))
        run_all(calls)
