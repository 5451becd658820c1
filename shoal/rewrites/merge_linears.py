"""Linear layers that are given the same input (query, key and value, say) are computed as one.

The weights are put together at each call, so parameters and gradients stay the author's; once where nothing is trained.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from shoal.rewrites.nodes import module_of
from shoal.rewrites.trace import Region

NAME, ORDER, TRAINS, INFERS = "merge_linears", 35, True, True


def rewrite(region: Region) -> int:
    """Merge the layers of each input that has several."""
    places = 0
    for source in list(region.graph.nodes):
        users = [user for user in source.users if _is_linear_of(region, user, source)]
        layers: list[Any] = [region.module(user) for user in users]
        if len(users) < 2 or len({layer.bias is None for layer in layers}) > 1 or len(set(map(id, layers))) < len(layers):
            continue
        first = next(node for node in region.graph.nodes if node in users)
        with region.graph.inserting_before(first):
            merged = region.graph.call_function(together(layers, region.frozen), (source,))
        for place, user in enumerate(users):
            with region.graph.inserting_before(user):
                part = region.graph.call_function(_part, (merged, place))
            user.replace_all_uses_with(part)
            region.graph.erase_node(user)
        places += 1
    return places


def _is_linear_of(region: Region, node: Any, source: Any) -> bool:
    # One that nobody uses gets no gradient: merged it would get zeros.
    return module_of(region, node, nn.Linear) is not None and node.args[0] is source and bool(node.users)


def _part(parts: tuple[torch.Tensor, ...], place: int) -> torch.Tensor:
    return parts[place]


def together(layers: list[Any], frozen: bool) -> Callable[[torch.Tensor], tuple[torch.Tensor, ...]]:
    """A function that computes what linear layers make of one input."""
    sizes = [layer.out_features for layer in layers]
    held: list[tuple[torch.Tensor, torch.Tensor | None]] = []

    def linears(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if held:
            weight, bias = held[0]
        else:
            weight = torch.cat([layer.weight for layer in layers])
            bias = None if layers[0].bias is None else torch.cat([layer.bias for layer in layers])
            if frozen:
                held.append((weight, bias))
        return F.linear(x, weight, bias).split(sizes, -1)

    return linears


