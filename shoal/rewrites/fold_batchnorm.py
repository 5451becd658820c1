"""A BatchNorm behind a convolution or a linear layer is folded into its weights where nothing is trained.

In evaluation BatchNorm multiplies each channel by one number and adds another, which the layer before it can do itself. The
folded weights are made at each call while weights may still change, and once where they are frozen, as in serving.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from shoal.rewrites.nodes import module_of, only_user, replace
from shoal.rewrites.trace import Region

NAME, ORDER, TRAINS, INFERS = "fold_batchnorm", 1, False, True

_PAIRS = {
    nn.Conv1d: nn.BatchNorm1d, nn.Conv2d: nn.BatchNorm2d, nn.Conv3d: nn.BatchNorm3d, nn.Linear: nn.BatchNorm1d,
}  # fmt: skip


def rewrite(region: Region) -> int:
    """Merge each BatchNorm with the layer before it that it alone uses."""
    places = 0
    for node in list(region.graph.nodes):
        layer: Any = module_of(region, node, tuple(_PAIRS))
        if layer is None:
            continue
        user = only_user(node)
        norm: Any = module_of(region, user, _PAIRS[type(layer)])
        if norm is None or user.args[0] is not node or norm.running_mean is None or norm.training:
            continue
        replace(user, folded(layer, norm, region.frozen), (node.args[0],))
        region.graph.erase_node(node)
        places += 1
    return places


def folded(
    layer: Any, norm: Any, frozen: bool, convolve: Callable[..., torch.Tensor] | None = None
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function that computes ``norm(layer(x))`` in one; its attribute ``folds`` is the two.

    ``convolve``: (x, weight, bias) -> what the layer would give with these, where another way is wanted than its own.
    """
    held: list[tuple[torch.Tensor, torch.Tensor]] = []

    def layer_with_norm(x: torch.Tensor) -> torch.Tensor:
        # A linear layer may be given rows of rows, which BatchNorm1d takes for channels.
        if norm.training or (isinstance(layer, nn.Linear) and x.dim() != 2):
            return norm(layer(x))  # type: ignore[no-any-return]
        weight, bias = held[0] if held else fold(layer, norm)
        if frozen and not held:
            held.append((weight, bias))
        if isinstance(layer, nn.Linear):
            return F.linear(x, weight, bias)
        return (convolve or layer._conv_forward)(x, weight, bias)  # type: ignore[no-any-return]

    layer_with_norm.folds = layer, norm  # type: ignore[attr-defined]
    return layer_with_norm


def fold(layer: Any, norm: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight and bias of a layer that does what a BatchNorm behind it does in evaluation."""
    factor = (norm.running_var + norm.eps).rsqrt()
    if norm.weight is not None:
        factor = factor * norm.weight
    shift = (layer.bias if layer.bias is not None else 0) - norm.running_mean
    bias = shift * factor + (norm.bias if norm.bias is not None else 0)
    return layer.weight * factor.view(-1, *[1] * (layer.weight.dim() - 1)), bias
