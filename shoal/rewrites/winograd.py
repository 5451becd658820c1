"""A 3 × 3 convolution takes a quarter of its multiplications, by Winograd's minimal filtering in a kernel of shoal's own.

General libraries compute it directly, near what the processor can do, so that only fewer operations help. In float32 the rounding
is about twice that of the direct way. Where the kernel does not take the tensors that come (``kernels/winograd.py: fits``), torch
computes the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from shoal.kernels.winograd import Prepared, conv3x3
from shoal.rewrites.fold_batchnorm import folded
from shoal.rewrites.nodes import attribute, module_of, replace
from shoal.rewrites.trace import Region

NAME, ORDER, TRAINS, INFERS = "winograd", 6, True, True

_LEAST_CHANNELS, _VECTOR = 16, 8
"""With fewer channels the transforms take what the products save; channels are whole vectors."""


def rewrite(region: Region) -> int:
    """Replace each such convolution, with a BatchNorm that was folded into it or without."""
    places = 0
    for node in list(region.graph.nodes):
        pair = getattr(node.target, "folds", None) if node.op == "call_function" else None
        if pair is not None and _is_simple(pair[0]):
            layer, norm = pair
            replace(node, folded(layer, norm, region.frozen, _convolve(region)), node.args)
            places += 1
        elif _is_simple(module_of(region, node, nn.Conv2d)):
            weight, bias = attribute(region, node, "weight"), attribute(region, node, "bias")
            replace(node, _convolve(region), (node.args[0], weight, bias))
            places += 1
    return places


def _convolve(region: Region) -> Callable[..., torch.Tensor]:
    if not region.frozen or region.training:
        return conv3x3
    prepared = Prepared()

    def prepared_conv3x3(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return prepared(x, weight, bias)

    return prepared_conv3x3


def _is_simple(conv: Any) -> bool:
    if not isinstance(conv, nn.Conv2d) or conv.kernel_size != (3, 3) or conv.padding_mode != "zeros" or conv.groups != 1:
        return False
    if conv.stride != (1, 1) or conv.dilation != (1, 1) or conv.padding not in ((1, 1), "same"):
        return False
    return all(n >= _LEAST_CHANNELS and n % _VECTOR == 0 for n in (conv.in_channels, conv.out_channels))
