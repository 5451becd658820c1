"""Pictures stay channels last through Flatten: the weight of the linear layer behind it is permuted instead of them.

The parameter and its gradient keep the author's order; the permuted copy is made at each call, and is small beside the
pictures of a batch. Where pictures come in another layout, nothing is done.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F

from shoal.rewrites.nodes import attribute, flattened, module_of, only_user, replace
from shoal.rewrites.trace import Region

NAME, ORDER, TRAINS, INFERS = "flatten", 20, True, True


def rewrite(region: Region) -> int:
    """Merge each Flatten with the linear layer that alone uses it."""
    places = 0
    for node in list(region.graph.nodes):
        source = flattened(node)
        if source is None:
            module = module_of(region, node, nn.Flatten)
            if isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) == (1, -1):
                source = node.args[0]
        user = only_user(node) if source is not None else None
        if user is None or module_of(region, user, nn.Linear) is None or user.args[0] is not node:
            continue
        weight, bias = attribute(region, user, "weight"), attribute(region, user, "bias")
        function = once(linear_of_flat) if region.frozen else linear_of_flat
        replace(user, function, (source, weight, bias))
        region.graph.erase_node(node)
        places += 1
    return places


def once(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """The function for a weight that stays: it is permuted once."""
    permuted: dict[tuple[int, ...], torch.Tensor] = {}

    def linear_of_flat_once(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        return function(x, weight, bias, permuted)

    return linear_of_flat_once


def linear_of_flat(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, kept: dict[tuple[int, ...], torch.Tensor] | None = None
) -> torch.Tensor:
    """``F.linear(x.flatten(1), weight, bias)``, without a copy of pictures that are channels last.

    ``kept`` holds permuted weights by the shape of a picture, where the weight stays what it is.
    """
    if x.dim() != 4 or x.is_contiguous() or not x.is_contiguous(memory_format=torch.channels_last):
        return F.linear(x.flatten(1), weight, bias)
    count, *shape = x.shape
    if shape[0] * shape[1] * shape[2] != weight.shape[1]:
        return F.linear(x.flatten(1), weight, bias)
    permuted = None if kept is None else kept.get(tuple(shape))
    if permuted is None:
        permuted = weight.reshape(-1, *shape).permute(0, 2, 3, 1).reshape(len(weight), -1)
        if kept is not None:
            kept[tuple(shape)] = permuted
    return F.linear(x.permute(0, 2, 3, 1).reshape(count, -1), permuted, bias)
