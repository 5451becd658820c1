"""A BatchNorm, the addition of a shortcut and the ReLU behind it are computed as one while the model is trained.

Each of the three would read and write the whole picture, forward and backward. Where the kernel does not take the tensors that
come (``kernels/batchnorm.py: fits``), the author's layers compute the same.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from shoal.kernels.batchnorm import batch_norm, count_batch, fits
from shoal.rewrites.nodes import calls, is_relu, only_user, replace
from shoal.rewrites.trace import Region, has_hooks

NAME, ORDER, TRAINS, INFERS = "norm_relu", 7, True, False


def rewrite(region: Region) -> int:
    """Merge each BatchNorm with the ReLU that alone uses it, or uses its sum with something else."""
    places = 0
    for node in list(region.graph.nodes):
        norm = _norm_of(region, node)
        user = only_user(node) if norm is not None else None
        if norm is None or user is None or node not in user.args:
            continue
        if is_relu(region, user):
            replace(user, _together(norm), (node.args[0],))
        else:
            more, relu = _added(user, node), only_user(user)
            if more is None or relu is None or not is_relu(region, relu):
                continue
            replace(relu, _together(norm), (node.args[0], more))
            region.graph.erase_node(user)
        region.graph.erase_node(node)
        places += 1
    return places


def _norm_of(region: Region, node: Any) -> nn.BatchNorm2d | None:
    """The BatchNorm that a node calls, where nobody has changed it but those who add up sums over workers."""
    if not isinstance(node, fx.Node) or node.op != "call_module" or len(node.args) != 1 or node.kwargs:
        return None
    module = region.module(node)
    if type(module) is not nn.BatchNorm2d or has_hooks(module) or hasattr(module, "parametrizations"):
        return None
    own = vars(module).get("forward")
    return module if own is None or hasattr(own, "batch_sums") else None


def _added(node: Any, to: fx.Node) -> fx.Node | None:
    """What a node adds to another's result; None where it does something else, or others would see it."""
    if node.kwargs or len(node.args) != 2:
        return None
    anyhow = calls(node, (operator.add, torch.add), ("add",))
    in_place = calls(node, (operator.iadd,), ("add_",)) and node.args[0] is to
    if not anyhow and not in_place:
        return None
    others = [given for given in node.args if given is not to]
    return others[0] if len(others) == 1 and isinstance(others[0], fx.Node) else None


def _together(norm: nn.BatchNorm2d) -> Callable[..., torch.Tensor]:
    """relu(norm(x) + more)."""

    def norm_relu(x: torch.Tensor, more: torch.Tensor | None = None) -> torch.Tensor:
        own = vars(norm).get("forward")
        ours = own is None or hasattr(own, "batch_sums")
        if not ours or not norm.training or x.shape[1] != norm.num_features or not fits(x, norm.weight) or not _alike(x, more):
            y = norm(x)
            return F.relu(y if more is None else y + more)
        averages = (norm.running_mean, norm.running_var)
        sums = None if own is None else own.batch_sums()
        return batch_norm(x, norm.weight, norm.bias, averages, count_batch(norm), norm.eps, more, True, sums)

    return norm_relu


def _alike(x: torch.Tensor, more: Any) -> bool:
    return more is None or (type(more) is torch.Tensor and more.shape == x.shape and more.dtype == x.dtype)
