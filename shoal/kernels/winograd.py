"""3 × 3 convolution, stride 1, padding 1, by Winograd's minimal filtering: winograd.c, and the same by torch without a compiler.

F(4 × 4, 3 × 3) of Lavin and Gray, "Fast Algorithms for Convolutional Neural Networks" (2016): a quarter of the multiplications of
the direct way, for the output and for both gradients. Its rounding is about twice that of the direct way in float32
(docs/log.md), since the interpolation points are not the paper's.
"""

from __future__ import annotations

import ctypes
import functools
import threading
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from shoal.kernels.build import operators
from shoal.kernels.parallel import cut, run_all
from shoal.kernels.plain import plain_autograd

_NAMES = {torch.float32: "f32", torch.float64: "f64"}
_POINTS, _GROUP = 36, 24
_FORWARD_BLOCK, _BACKWARD_BLOCK = 48, 64
"""The most tiles that are worked on together."""
_LAST = torch.channels_last


def conv3x3(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """conv2d(x, weight, bias, stride=1, padding=1), with its gradients.

    Args:
        x: (N, C, H, W), ``weight``: (K, C, 3, 3), ``bias``: (K,) or None.

    Returns (N, K, H, W), contiguous in channels_last. Where ``fits`` says no, torch computes it.
    """
    if not fits(x, weight):
        return functional.conv2d(x, weight, bias, padding=1)
    return _Winograd.apply(x, weight, bias)  # type: ignore[no-any-return, no-untyped-call]


def fits(x: torch.Tensor, weight: torch.Tensor) -> bool:
    """Whether the operator in C takes these: whole vectors of channels, channels last, and autograd in the plain way."""
    if x.dtype not in _NAMES or weight.dtype != x.dtype or x.device.type != "cpu" or weight.device.type != "cpu":
        return False
    if type(x) not in (torch.Tensor, nn.Parameter) or x.dim() != 4 or not x.numel() or x.shape[1] != weight.shape[1]:
        return False
    if not x.is_contiguous(memory_format=_LAST) or not plain_autograd():
        return False
    library = _library()
    return library is not None and not any(n % library.shoal_winograd_lanes(x.dtype.itemsize) for n in weight.shape[:2])


class Prepared:
    """A convolution whose weight does not change any more: it is transformed once for each type of numbers, where that pays."""

    def __init__(self) -> None:
        self._ready: dict[torch.dtype, torch.Tensor] = {}

    def __call__(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        """As ``conv3x3``, for the same weight at each call."""
        if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
            # A model may differentiate its own output when it answers.
            return conv3x3(x, weight, bias)
        if not fits(x, weight):
            return functional.conv2d(x, weight, bias, padding=1)
        shape = _shape(x, weight.shape[0], len(x), _FORWARD_BLOCK)
        if _tiles(shape) <= shape.block:
            return _convolve(x, weight.detach(), bias)
        if x.dtype not in self._ready:
            self._ready[x.dtype] = _transformed(shape, *_forward_strides(weight), x)
        return _convolve(x, weight.detach(), bias, ready=self._ready[x.dtype])


class _Shape(ctypes.Structure):
    """``Shape`` of winograd.c."""

    _fields_ = [(name, ctypes.c_int64) for name in ("images", "height", "width", "channels", "outputs", "block")]


class _Strides(ctypes.Structure):
    """``Strides`` of winograd.c."""

    _fields_ = [(name, ctypes.c_int64) for name in ("output", "channel", "tap")]


@functools.lru_cache(maxsize=1)
def _library() -> ctypes.CDLL | None:
    return operators(Path(__file__).with_suffix(".c"), {"weights": 4 * "P", "forward": 8 * "P", "backward": 6 * "P"})


def _run(name: str, dtype: torch.dtype) -> Any:
    return getattr(_library(), f"shoal_winograd_{name}_{_NAMES[dtype]}")


class _Scratch(threading.local):
    """Memory of this thread that is used again: fresh pages at each call would take longer than to compute in them."""

    def __init__(self) -> None:
        self._held: dict[str, torch.Tensor] = {}

    def take(self, name: str, count: int, like: torch.Tensor) -> torch.Tensor:
        """At least so many numbers of the same type, with anything in them."""
        size = count * like.dtype.itemsize
        held = self._held.get(name)
        if held is None or len(held) < size:
            self._held[name] = held = torch.empty(size, dtype=torch.uint8)
        return held


_scratch = _Scratch()


def _shape(x: torch.Tensor, outputs: int, images: int, most: int) -> _Shape:
    """The sizes of a piece of x, cut into blocks of up to ``most`` tiles that are about the same."""
    _, channels, height, width = x.shape
    shape = _Shape(images, height, width, channels, outputs, 0)
    tiles = _tiles(shape)
    shape.block = -(-tiles // -(-tiles // most))
    return shape


def _tiles(shape: _Shape) -> int:
    return int(shape.images) * -(-shape.height // 4) * -(-shape.width // 4)


def _panels(shape: _Shape, itemsize: int) -> tuple[int, int]:
    """How many panels of outputs there are, and how wide one is."""
    library = _library()
    assert library is not None
    width = library.shoal_winograd_panel(itemsize)
    return -(-shape.outputs // width), width


def _forward_strides(weight: torch.Tensor) -> tuple[int, _Strides]:
    """Where the first tap of a weight is, and how far apart are outputs, channels and taps."""
    by = weight.stride()
    return weight.data_ptr(), _Strides(by[0], by[1], by[3])


def _reversed_strides(weight: torch.Tensor) -> tuple[int, _Strides]:
    """The same for the gradient of the input: a convolution with taps in reverse, from outputs to channels."""
    by = weight.stride()
    return weight.data_ptr() + 8 * by[3] * weight.itemsize, _Strides(by[1], by[0], -by[3])


def _regular(weight: torch.Tensor) -> torch.Tensor:
    """The weight, copied where its nine taps are not evenly apart."""
    return weight if weight.stride(2) == 3 * weight.stride(3) else weight.contiguous()


def _transformed(
    shape: _Shape, place: int, by: _Strides, like: torch.Tensor, scratch: _Scratch | None = None
) -> torch.Tensor:
    panels, width = _panels(shape, like.itemsize)
    count = _POINTS * panels * (shape.channels + 1) * width
    ready = like.new_empty(count) if scratch is None else scratch.take("weights", count, like)
    _run("weights", like.dtype)(ctypes.byref(shape), place, ctypes.byref(by), ready.data_ptr())
    return ready


def _convolve(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, backwards: bool = False, ready: torch.Tensor | None = None
) -> torch.Tensor:
    """The convolution of x; ``backwards``: x is the gradient of an output, and the gradient of the input comes out."""
    weight = _regular(weight)
    place, by = _reversed_strides(weight) if backwards else _forward_strides(weight)
    outputs = weight.shape[1 if backwards else 0]
    out = torch.empty((len(x), outputs, *x.shape[2:]), dtype=x.dtype, memory_format=_LAST)
    cuts = cut(len(x))
    whole = _shape(x, outputs, max(stop - start for start, stop in cuts), _FORWARD_BLOCK)
    if ready is None and _tiles(whole) > whole.block:
        ready = _transformed(whole, place, by, x, _scratch)
    bias = None if bias is None else bias.detach().contiguous()

    def compute(start: int, stop: int) -> None:
        shape = _Shape.from_buffer_copy(whole)
        shape.images = stop - start
        _, width = _panels(shape, x.itemsize)
        block, channels = shape.block, shape.channels
        scratch = _scratch.take("forward", channels + _POINTS * (block * (channels + width) + (_GROUP + 3) * width), x)
        _run("forward", x.dtype)(
            ctypes.byref(shape), x[start:stop].data_ptr(), place, ctypes.byref(by), None if ready is None else ready.data_ptr(),
            None if bias is None else bias.data_ptr(), out[start:stop].data_ptr(), scratch.data_ptr(),
        )  # fmt: skip

    run_all([functools.partial(compute, *bounds) for bounds in cuts])
    return out


def _weight_gradient(x: torch.Tensor, gradient: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    cuts = cut(len(x))
    outputs, channels = weight.shape[:2]
    found = [torch.empty_like(_regular(weight)) for _ in cuts]

    def compute(out: torch.Tensor, start: int, stop: int) -> None:
        shape = _shape(x, outputs, stop - start, _BACKWARD_BLOCK)
        _, width = _panels(shape, x.itemsize)
        sums = outputs * channels if _tiles(shape) > shape.block else _GROUP * width
        count = max(channels, outputs) + _POINTS * (shape.block * (channels + outputs) + 2 * width + sums)
        scratch = _scratch.take("backward", count, x)
        _, by = _forward_strides(out)
        _run("backward", x.dtype)(
            ctypes.byref(shape), x[start:stop].data_ptr(), gradient[start:stop].data_ptr(), ctypes.byref(by), out.data_ptr(),
            scratch.data_ptr(),
        )  # fmt: skip

    run_all([functools.partial(compute, out, *bounds) for out, bounds in zip(found, cuts, strict=True)])
    return functools.reduce(torch.add, found)


class _Winograd(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        ctx.save_for_backward(x, weight, bias)
        return _convolve(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        if torch.is_grad_enabled():
            # The gradient is to be differentiated once more. x may itself come from the weight: stand-ins keep the two apart.
            given: tuple[Any, Any, Any] = (x.view_as(x), weight.view_as(weight), None if bias is None else bias.view_as(bias))
            asked = [t for t, needed in zip(given, wanted, strict=True) if needed]
            again = functional.conv2d(given[0], given[1], given[2], padding=1)
            found = iter(torch.autograd.grad(again, asked, gradients, create_graph=True))
            return tuple(next(found) if needed else None for needed in wanted)
        gradient = gradients[0].contiguous(memory_format=_LAST)
        for_x = _convolve(gradient, weight, None, backwards=True) if wanted[0] else None
        for_weight = _weight_gradient(x, gradient, weight) if wanted[1] else None
        for_bias = gradient.sum((0, 2, 3)) if wanted[2] else None
        return for_x, for_weight, for_bias
