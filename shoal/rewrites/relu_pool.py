"""An activation that never falls is computed behind the max-pool instead of before: the same on a quarter of the data.

The largest value of a window stays the largest, so max(relu(x)) = relu(max(x)), and the gradient goes the same way: where
the largest is below zero, ReLU stops it either way.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from shoal.rewrites.nodes import calls, is_relu, module_of, only_user
from shoal.rewrites.trace import Region

NAME, ORDER, TRAINS, INFERS = "relu_pool", 10, True, True

_MODULES = (nn.ReLU6, nn.LeakyReLU, nn.Sigmoid, nn.Tanh)
_POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
_FUNCTIONS = (torch.max_pool1d, torch.max_pool2d, torch.max_pool3d, F.max_pool1d, F.max_pool2d, F.max_pool3d)


def rewrite(region: Region) -> int:
    """Move each such activation behind the pool that alone uses it."""
    places = 0
    for node in list(region.graph.nodes):
        pool = only_user(node) if _never_falls(region, node) else None
        if pool is None or not _is_pool(region, pool) or pool.args[0] is not node:
            continue
        source: Any = node.args[0]
        pool.replace_input_with(node, source)
        pool.replace_all_uses_with(node, delete_user_cb=lambda user, own=node: user is not own)
        node.replace_input_with(source, pool)
        pool.append(node)
        places += 1
    return places


def _never_falls(region: Region, node: Any) -> bool:
    if is_relu(region, node):
        source = node.args[0]
        # In place it would be seen by whoever else reads its input.
        return isinstance(source, fx.Node) and only_user(source) is node
    module = module_of(region, node, _MODULES)
    if isinstance(module, nn.LeakyReLU):
        return module.negative_slope >= 0 and not module.inplace
    return module is not None and not getattr(module, "inplace", False)


def _is_pool(region: Region, node: Any) -> bool:
    module = module_of(region, node, _POOLS)
    if module is not None:
        return not module.return_indices
    return calls(node, _FUNCTIONS) and not node.kwargs.get("return_indices", False) and len(node.args) < 7
