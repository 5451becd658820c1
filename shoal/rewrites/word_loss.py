"""Scores of a large vocabulary are computed piece by piece where only their cross-entropy is wanted, and not for ignored targets.

The scores of all words at all places are the largest tensor of a language model, and are read and written half a dozen times
between the last layer and its gradient. Here the layer gives back something that stands for its output (``Scores``). Whatever
is done with it computes the output, as the author wrote it; only ``cross_entropy`` knows better: some rows at a time, while
they are in the cache, with their gradients, and without the rows whose target is ignored.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

NAME, ORDER, TRAINS, INFERS = "word_loss", 30, True, False

LEAST_WORDS = 512
_PIECE_BYTES = 1 << 20
_LEAST_ROWS = 32


class _Use:
    """What a layer's output is used for: where that is never a cross-entropy, the layer is left alone from then on.

    Which changes no bit: an output that is asked for is what the layer would have given.
    """

    def __init__(self, report: Callable[[], None]) -> None:
        self.fits, self._known = True, False
        self._report = report

    def found(self) -> None:
        self._known = True
        self._report()

    def asked_for(self) -> None:
        self.fits = self._known


def replace_leaf(layer: nn.Module, found: Callable[[], None]) -> Callable[[torch.Tensor], torch.Tensor] | None:
    """Another forward for a linear layer with many outputs; ``found`` is called when it turns out to be of use."""
    if type(layer) is not nn.Linear or layer.out_features < max(LEAST_WORDS, 2 * layer.in_features):
        return None
    return _Forward(layer, _Use(found))


class _Forward:
    """What stands in the place of a layer's forward."""

    def __init__(self, layer: nn.Linear, use: _Use) -> None:
        self._layer, self._use = layer, use

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        layer, use = self._layer, self._use
        weight, bias = layer.weight, layer.bias
        plain = type(x) is torch.Tensor and x.is_floating_point() and x.dtype == weight.dtype and x.dim() >= 2
        if not plain or not use.fits or not layer.training or not torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
            return F.linear(x, weight, bias)
        return Scores.of(x, weight, bias, use)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        # A copy of the layer, say a teacher's that the author's step makes, has weights of its own.
        return functools.partial(nn.Linear.forward, copy.deepcopy(self._layer, memo))

    def __reduce__(self) -> tuple[Any, ...]:
        return functools.partial, (nn.Linear.forward, self._layer)


class Scores(torch.Tensor):
    """Stands for ``linear(x, weight, bias)``, which is computed when somebody asks for it."""

    _parts: tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
    _value: torch.Tensor | None
    _use: _Use

    @staticmethod
    def of(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, use: _Use) -> Scores:
        shape = (*x.shape[:-1], weight.shape[0])
        made: Scores = torch.Tensor._make_wrapper_subclass(Scores, shape, dtype=x.dtype, device=x.device)
        made._parts, made._value, made._use = (x, weight, bias), None, use
        return made

    def value(self) -> torch.Tensor:
        """The output itself, with its history."""
        if self._value is not None:
            return self._value
        self._use.asked_for()
        value = F.linear(*self._parts)
        if torch.is_grad_enabled():
            self._value = value
        return value

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        special = _SPECIAL.get(func)
        if special is not None and args and isinstance(args[0], Scores):
            found = special(args[0], *args[1:], **kwargs)
            if found is not None:
                return found
        return func(*(_value_of(a) for a in args), **{key: _value_of(a) for key, a in kwargs.items()})

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        raise NotImplementedError(f"{func} was given scores that are not computed yet")


def _value_of(given: Any) -> Any:
    if isinstance(given, Scores):
        return given.value()
    if isinstance(given, (tuple, list)) and any(isinstance(entry, Scores) for entry in given):
        return type(given)(_value_of(entry) for entry in given)
    return given


def _shape(scores: Scores) -> torch.Size:
    x, weight, _ = scores._parts
    return torch.Size((*x.shape[:-1], weight.shape[0]))


def _size(scores: Scores, dim: int | None = None) -> Any:
    return _shape(scores) if dim is None else _shape(scores)[dim]


def _reshaped(scores: Scores, *shape: Any) -> Scores | None:
    """Rows put together; None where the scores themselves would be cut."""
    wanted = tuple(shape[0]) if len(shape) == 1 and isinstance(shape[0], (tuple, list)) else tuple(shape)
    x, weight, bias = scores._parts
    rows = x.numel() // x.shape[-1]
    if scores._value is not None or len(wanted) != 2 or wanted[1] != weight.shape[0] or wanted[0] not in (-1, rows):
        return None
    return Scores.of(x.reshape(rows, x.shape[-1]), weight, bias, scores._use)


def _flattened(scores: Scores, start_dim: int = 0, end_dim: int = -1) -> Scores | None:
    dims = scores._parts[0].dim()
    if start_dim == 0 and end_dim % dims == dims - 2:
        return _reshaped(scores, -1, scores._parts[1].shape[0])
    return None


def _itself(scores: Scores) -> Scores:
    return scores


def _float(scores: Scores) -> Scores | None:
    return scores if scores._parts[0].dtype == torch.float32 else None


def _cross_entropy(
    scores: Scores, target: torch.Tensor, weight: Any = None, size_average: Any = None, ignore_index: int = -100,
    reduce: Any = None, reduction: str = "mean", label_smoothing: float = 0.0,
) -> torch.Tensor | None:  # fmt: skip
    x, own, bias = scores._parts
    usual = weight is None and size_average is None and reduce is None and not label_smoothing
    fits = x.dim() == 2 and type(target) is torch.Tensor and target.dim() == 1 and target.dtype == torch.int64
    if scores._value is not None or not usual or not fits or reduction not in ("mean", "sum") or len(target) != len(x):
        return None
    scores._use.found()
    rows = (target != ignore_index).nonzero().squeeze(1)
    if len(rows) < len(target):
        x, target = x.index_select(0, rows), target.index_select(0, rows)
    total: torch.Tensor = _SumOfCrossEntropies.apply(x, own, bias, target)  # type: ignore[no-untyped-call]
    return total / len(target) if reduction == "mean" else total


class _SumOfCrossEntropies(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, target: torch.Tensor
    ) -> torch.Tensor:
        wanted = ctx.needs_input_grad
        for_x = torch.empty_like(x) if wanted[0] else None
        for_weight = torch.zeros_like(weight) if wanted[1] else None
        for_bias = torch.zeros_like(bias) if bias is not None and wanted[2] else None
        total = x.new_zeros((), dtype=torch.float64)
        rows = max(_LEAST_ROWS, _PIECE_BYTES // (weight.shape[0] * x.element_size()))
        for start in range(0, len(x), rows):
            own, aim = x[start : start + rows], target[start : start + rows].unsqueeze(1)
            scores = F.linear(own, weight, bias)
            scores.sub_(scores.amax(1, keepdim=True))
            right = scores.gather(1, aim)
            sums = scores.exp_().sum(1, keepdim=True)
            total += (sums.log() - right).sum(dtype=torch.float64)
            # The gradient of the scores: probabilities, less one at the target.
            scores.div_(sums).scatter_add_(1, aim, right.new_full((), -1).expand_as(right))
            if for_x is not None:
                for_x[start : start + rows] = scores @ weight
            if for_weight is not None:
                for_weight.addmm_(scores.t(), own)
            if for_bias is not None:
                for_bias += scores.sum(0)
        ctx.save_for_backward(x, weight, bias, target, for_x, for_weight, for_bias)
        return total.to(x.dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, bias, target, *made = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return *(None if own is None else own * gradients[0] for own in made), None
        # The gradient is to be differentiated once more. By names of their own, for x may depend on the weight.
        x, weight = x.view_as(x), weight.view_as(weight)
        bias = None if bias is None else bias.view_as(bias)
        needed = ctx.needs_input_grad[:3]
        wanted: list[Any] = [tensor for tensor, need in zip((x, weight, bias), needed, strict=True) if need]
        total = F.cross_entropy(F.linear(x, weight, bias), target, reduction="sum")
        found = iter(torch.autograd.grad(total, wanted, gradients, create_graph=True))
        return *(next(found) if need else None for need in needed), None


_SPECIAL: dict[Any, Callable[..., Any]] = {
    vars(torch._C.TensorBase)["shape"].__get__: _shape,
    torch.Tensor.size: _size,
    torch.Tensor.view: _reshaped,
    torch.Tensor.reshape: _reshaped,
    torch.reshape: _reshaped,
    torch.Tensor.flatten: _flattened,
    torch.flatten: _flattened,
    torch.Tensor.contiguous: _itself,
    torch.Tensor.float: _float,
    F.cross_entropy: _cross_entropy,
}
