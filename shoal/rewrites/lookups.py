"""Embeddings that are given the same numbers are looked up in one pass, and summed on the way where only the sum is wanted.

Where the kernel does not take the tensors that come (``kernels/lookups.py: fits``), the author's layers compute the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from shoal.kernels.lookups import How, fits, lookups
from shoal.rewrites.nodes import argument, calls, module_of, only_user
from shoal.rewrites.trace import Region

NAME, ORDER, TRAINS, INFERS = "lookups", 45, True, False


@dataclass(frozen=True)
class _Wanted:
    """A table, and over which dims of its rows the sum is wanted; None where the rows are."""

    layer: nn.Embedding
    dims: tuple[int, ...] | None

    def without(self, ids: torch.Tensor) -> torch.Tensor:
        rows = self.layer(ids)
        return rows if self.dims is None else rows.sum(self.dims)

    def sums_samples(self, last: int) -> bool:
        """Whether all dims but the first are summed over, of rows for numbers of so many dims."""
        return self.dims is not None and sorted(d % (last + 1) for d in self.dims) == list(range(1, last + 1))


def rewrite(region: Region) -> int:
    """Merge the lookups by each tensor of numbers."""
    places = 0
    for source in list(region.graph.nodes):
        users = [user for user in source.users if _is_lookup(region, user)]
        if not users:
            continue
        layers: list[Any] = [region.module(user) for user in users]
        sums = [_summed(user) for user in users]
        wanted = [_Wanted(layer, None if found is None else found[1]) for layer, found in zip(layers, sums, strict=True)]
        first = next(node for node in region.graph.nodes if node in users)
        with region.graph.inserting_before(first):
            merged = region.graph.call_function(_together(wanted), (source,))
        for place, (user, found) in enumerate(zip(users, sums, strict=True)):
            replaced = user if found is None else found[0]
            with region.graph.inserting_before(replaced):
                part = region.graph.call_function(_part, (merged, place))
            replaced.replace_all_uses_with(part)
            region.graph.erase_node(replaced)
            if replaced is not user:
                region.graph.erase_node(user)
        places += 1
    return places


def _is_lookup(region: Region, node: Any) -> bool:
    """Whether a node looks up a table in torch's own way, with gradients for the whole of it."""
    layer: Any = module_of(region, node, nn.Embedding)
    # One whose rows nobody uses gets no gradient.
    return layer is not None and not layer.sparse and not layer.scale_grad_by_freq and layer.max_norm is None and bool(node.users)


def _summed(node: Any) -> tuple[fx.Node, tuple[int, ...]] | None:
    """The sum that alone uses a node, and the dims that it is over; None where there is none."""
    user = only_user(node)
    if not calls(user, (torch.sum,), ("sum",)) or user.args[0] is not node or set(user.kwargs) - {"dim"}:
        return None
    dims = argument(user, 1, "dim")
    dims = (dims,) if isinstance(dims, int) else dims
    whole = isinstance(dims, (tuple, list)) and dims and all(type(d) is int for d in dims) and len(user.args) <= 2
    return (user, tuple(dims)) if whole else None


def _together(wanted: list[_Wanted]) -> Callable[[torch.Tensor], tuple[torch.Tensor, ...]]:
    """What is wanted of all tables, for the same numbers."""

    @functools.cache
    def how(dims: int) -> tuple[How, bool]:
        """For numbers of so many dims: how each table is looked up, and whether all sums are made on the way."""
        sums = [one.sums_samples(dims) for one in wanted]
        paddings = [-1 if one.layer.padding_idx is None else one.layer.padding_idx for one in wanted]
        return tuple(zip(paddings, sums, strict=True)), all(s or one.dims is None for s, one in zip(sums, wanted, strict=True))

    layers = [one.layer for one in wanted]

    def found(ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        weights = [layer.weight for layer in layers]
        if not fits(ids, weights):
            return tuple(one.without(ids) for one in wanted)
        asked, whole = how(ids.dim())
        rows = lookups(ids, weights, asked)
        if whole:
            return rows
        return tuple(
            part if summed or one.dims is None else part.sum(one.dims)
            for part, (_, summed), one in zip(rows, asked, wanted, strict=True)
        )

    return found


def _part(parts: tuple[torch.Tensor, ...], place: int) -> torch.Tensor:
    return parts[place]
