"""A convolution of few channels, its ReLU and the max-pool behind it are computed in one pass, by a kernel of shoal's own.

What the convolution gives is four times as large as what the pooling lets through; in one pass it never reaches memory. Where
the kernel does not take the tensors that come (``kernels/conv_pool.py: fits``), torch computes the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from shoal.kernels.conv_pool import conv_relu_pool
from shoal.rewrites.nodes import argument, attribute, calls, is_relu, module_of, only_user, replace
from shoal.rewrites.trace import Region

NAME, ORDER, TRAINS, INFERS = "conv_pool", 5, True, True

_MOST_CHANNELS = 16


def rewrite(region: Region) -> int:
    """Merge each convolution with the ReLU and the 2 × 2 pool that follow it, in either order."""
    places = 0
    for node in list(region.graph.nodes):
        conv = module_of(region, node, nn.Conv2d)
        if not isinstance(conv, nn.Conv2d) or not _is_simple(conv):
            continue
        merged = _followers(region, node)
        if merged is None:
            continue
        weight, bias = attribute(region, node, "weight"), attribute(region, node, "bias")
        padding = tuple(int(p) for p in conv.padding)
        replace(merged[-1], conv_relu_pool, (node.args[0], weight, bias, padding, len(merged) == 2, 2))
        for own in [*reversed(merged[:-1]), node]:
            region.graph.erase_node(own)
        places += 1
    return places


def _is_simple(conv: nn.Conv2d) -> bool:
    ones = conv.stride == (1, 1) and conv.dilation == (1, 1) and conv.groups == 1
    return ones and conv.padding_mode == "zeros" and not isinstance(conv.padding, str) and conv.in_channels <= _MOST_CHANNELS


def _followers(region: Region, node: Any) -> list[Any] | None:
    """The nodes that follow a convolution and belong to it: a pool, with a ReLU before or behind it or without one."""
    first = only_user(node)
    if first is None or first.args[:1] != (node,):
        return None
    second = only_user(first)
    follows = second is not None and second.args[:1] == (first,)
    if _is_pool(region, first):
        return [first, second] if follows and is_relu(region, second) else [first]
    return [first, second] if is_relu(region, first) and follows and _is_pool(region, second) else None


def _is_pool(region: Region, node: Any) -> bool:
    """Whether it is a max-pool over windows of 2 × 2 that do not overlap and leave out what does not fill one."""
    pool = module_of(region, node, nn.MaxPool2d)
    if isinstance(pool, nn.MaxPool2d):
        given: tuple[Any, ...] = (pool.kernel_size, pool.stride, pool.padding, pool.dilation, pool.ceil_mode)
        plain = not pool.return_indices
    elif calls(node, (F.max_pool2d, torch.max_pool2d)):
        defaults = {"kernel_size": None, "stride": None, "padding": 0, "dilation": 1, "ceil_mode": False}
        given = tuple(argument(node, k + 1, name, default) for k, (name, default) in enumerate(defaults.items()))
        plain = not argument(node, 6, "return_indices", False)
    else:
        return False
    size, stride, padding, dilation, ceil = given
    twos = size in (2, (2, 2), [2, 2]) and stride in (None, 2, (2, 2), [2, 2])
    return plain and twos and padding in (0, (0, 0)) and dilation in (1, (1, 1)) and not ceil
