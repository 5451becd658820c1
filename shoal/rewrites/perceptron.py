"""A chain of small linear layers and ReLUs is computed as one operator while the model is trained.

For layers as small as a recommender's, most of a step is calling the operations between which the numbers go back and forth.
Where the kernel does not take the tensors that come (``kernels/perceptron.py: fits``), the author's layers compute the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from shoal.kernels.perceptron import fits, perceptron
from shoal.rewrites.nodes import is_relu, module_of, only_user, replace
from shoal.rewrites.trace import Region

NAME, ORDER, TRAINS, INFERS = "perceptron", 40, True, False

_LEAST_WEIGHTS, _MOST_WEIGHTS = 1 << 12, 1 << 17
"""In a chain: a smaller one gains less than finding that out takes; large products are better left to torch's library."""
Link = tuple[nn.Linear, bool]


def rewrite(region: Region) -> int:
    """Merge each chain of at least two linear layers of which nobody else sees what is between them."""
    places = 0
    seen: set[Any] = set()
    for node in list(region.graph.nodes):
        if node in seen or module_of(region, node, nn.Linear) is None:
            continue
        links, nodes = _chain(region, node)
        seen.update(nodes)
        if len(links) < 2 or not _LEAST_WEIGHTS <= sum(layer.weight.numel() for layer, _ in links) <= _MOST_WEIGHTS:
            continue
        *inner, last = nodes
        replace(last, _together(links), (node.args[0],))
        for one in reversed(inner):
            region.graph.erase_node(one)
        places += 1
    return places


def _chain(region: Region, node: Any) -> tuple[list[Link], list[Any]]:
    """The layers from a node on, each with whether a ReLU follows, and the nodes of them all."""
    links: list[Link] = []
    nodes: list[Any] = []
    while node is not None and isinstance(layer := module_of(region, node, nn.Linear), nn.Linear):
        nodes.append(node)
        node = only_user(node)
        relu = node is not None and is_relu(region, node)
        if relu:
            nodes.append(node)
            node = only_user(node)
        links.append((layer, relu))
    return links, nodes


def _together(links: list[Link]) -> Callable[[torch.Tensor], torch.Tensor]:
    """The layers, one after the other."""

    def layers(x: torch.Tensor) -> torch.Tensor:
        found = [(layer.weight, layer.bias, relu) for layer, relu in links]
        if fits(x, found):
            return perceptron(x, found)
        for layer, relu in links:
            x = layer(x)
            x = F.relu(x) if relu else x
        return x

    return layers
