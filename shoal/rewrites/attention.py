"""Attention that is written out becomes torch's scaled_dot_product_attention, which never holds the whole matrix of scores.

softmax(q @ k.transpose(-2, -1) * scale + mask) @ v, with the scale multiplied or divided, on the scores or on q, and with
masked_fill in place of a mask that is added. Where dropout is applied to the weights, only if it does nothing.
"""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.nn import functional as F

from shoal.rewrites.nodes import argument, calls, module_of, only_user, replace
from shoal.rewrites.trace import Region

NAME, ORDER, TRAINS, INFERS = "attention", 40, True, True

_PRODUCTS = (torch.matmul, torch.bmm, operator.matmul)
_SOFTMAX = (torch.softmax, F.softmax)


@dataclass
class _Scores:
    """What goes into a softmax: (factor · q) @ kᵀ, a mask that is added, and one whose places are filled."""

    query: Any
    key: Any
    factor: Any = None
    divided: bool = False
    added: Any = None
    filled: Any = None


def rewrite(region: Region) -> int:
    """Replace each attention whose parts nobody else uses."""
    places = 0
    nodes: list[Any] = list(region.graph.nodes)
    for node in nodes:
        if not calls(node, _PRODUCTS, ("matmul", "bmm", "__matmul__")) or len(node.args) != 2:
            continue
        weights = _without_dropout(region, node.args[0])
        if weights is None or not _is_softmax(region, weights) or only_user(weights) is None:
            continue
        scores = _scores(weights.args[0])
        if scores is None:
            continue
        given = (scores.query, scores.key, node.args[1], scores.factor, scores.divided, scores.added, scores.filled)
        below = node.args[0]
        replace(node, attend, given)
        _erase_unused(region.graph, below)
        places += 1
    return places


def _is_node(value: Any) -> bool:
    return isinstance(value, fx.Node)


def _without_dropout(region: Region, node: Any) -> Any:
    """The node below a dropout that does nothing; None below one that may do something."""
    if not _is_node(node):
        return None
    dropout = module_of(region, node, nn.Dropout)
    if isinstance(dropout, nn.Dropout):
        idle = dropout.p == 0 or not (region.training and dropout.training)
        return node.args[0] if idle and only_user(node) is not None else None
    if calls(node, (F.dropout, torch.dropout)):
        chance, active = argument(node, 1, "p", 0.5), argument(node, 2, "training", True)
        return node.args[0] if (chance == 0 or active is False) and only_user(node) is not None else None
    return node


def _is_softmax(region: Region, node: Any) -> bool:
    module = module_of(region, node, nn.Softmax)
    if isinstance(module, nn.Softmax):
        return module.dim == -1
    if not calls(node, _SOFTMAX, ("softmax",)) or argument(node, 1, "dim") != -1:
        return False
    return len(node.args) <= 2 and node.kwargs.get("dtype") is None


def _scores(node: Any) -> _Scores | None:
    """Read what a softmax is given, from the outside inwards; None where it is something else."""
    added = filled = factor = None
    divided = False
    while _is_node(node) and only_user(node) is not None:
        if calls(node, (torch.masked_fill,), ("masked_fill",)) and filled is None and added is None and factor is None:
            if argument(node, 2, "value") not in (float("-inf"), -math.inf):
                return None
            node, filled = node.args[0], argument(node, 1, "mask")
        elif calls(node, (operator.add, torch.add), ("add", "__add__")) and len(node.args) == 2 and not node.kwargs:
            if added is not None or factor is not None or not _is_node(node.args[1]):
                return None
            node, added = node.args
        elif calls(node, (operator.mul, torch.mul, operator.truediv, torch.div), ("mul", "div")) and len(node.args) == 2:
            if factor is not None or node.kwargs:
                return None
            divided = calls(node, (operator.truediv, torch.div), ("div",))
            node, factor = node.args
            if _is_node(factor):
                return None
        elif calls(node, _PRODUCTS, ("matmul", "bmm", "__matmul__")) and len(node.args) == 2:
            query, turned = node.args
            if not calls(turned, (torch.transpose,), ("transpose",)) or only_user(turned) is None:
                return None
            if turned.kwargs or sorted(turned.args[1:]) != [-2, -1]:
                return None
            return _Scores(query, turned.args[0], factor, divided, added, filled)
        else:
            return None
    return None


def _erase_unused(graph: fx.Graph, node: Any) -> None:
    """Take a node out whose result nobody uses, and then what it was made of."""
    if _is_node(node) and not node.users and node.op not in ("placeholder", "output"):
        made_of = list(node.all_input_nodes)
        graph.erase_node(node)
        for source in made_of:
            if source.op == "call_function" or (source.op == "call_method" and not str(source.target).endswith("_")):
                _erase_unused(graph, source)


def attend(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, factor: Any, divided: bool, added: Any, filled: Any
) -> torch.Tensor:
    """The attention that the arguments describe, by torch's own function where it takes them."""
    scale = 1.0 if factor is None else 1.0 / factor if divided else float(factor)
    mask = added
    if filled is not None:
        mask = ~filled if filled.dtype == torch.bool else None
    same = query.dim() == key.dim() == value.dim() and query.dtype == key.dtype == value.dtype
    usual = same and query.dim() >= 3 and query.is_floating_point() and (filled is None) + (added is None) >= 1
    fits = usual and (filled is None or mask is not None) and _broadcasts(mask, query, key)
    if not fits or (added is not None and added.dtype != query.dtype) or (filled is not None and bool(filled.all(-1).any())):
        return _written_out(query, key, value, factor, divided, added, filled)
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)


def _broadcasts(mask: Any, query: torch.Tensor, key: torch.Tensor) -> bool:
    if mask is None:
        return True
    wanted = (*query.shape[:-1], key.shape[-2])
    shape = (1,) * (len(wanted) - mask.dim()) + tuple(mask.shape)
    return len(shape) == len(wanted) and all(own in (1, other) for own, other in zip(shape, wanted, strict=True))


def _written_out(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, factor: Any, divided: bool, added: Any, filled: Any
) -> torch.Tensor:
    scores = query @ key.transpose(-2, -1)
    if factor is not None:
        scores = scores / factor if divided else scores * factor
    if added is not None:
        scores = scores + added
    if filled is not None:
        scores = scores.masked_fill(filled, -math.inf)
    return scores.softmax(-1) @ value
