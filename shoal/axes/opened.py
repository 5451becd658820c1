"""Split activations at the door of a block, as plain tensors that torch's own machinery can follow.

Autograd does not see a ``Cut``, only the local part inside it. Whatever attaches itself to a block's inputs and
outputs (FSDP2's hooks, checkpointing) would hold on to the wrapper and lose the gradient. So a block's door opens every Cut
to its part before such machinery looks at it, and closes it again behind.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.utils import _pytree as pytree

from shoal.axes.tensor_cut import Cut


class _Cover:
    """What an opened Cut was; no tensor, so that nobody takes it for one."""

    def __init__(self, cut: Cut) -> None:
        # Not the Cut itself: it would keep its part alive, which recomputing is meant to drop.
        self.kind, self.dim, self.widths, self.team, self.origins = (
            type(cut), cut.split_dim, cut.widths, cut.team, cut.origins,
        )  # fmt: skip

    def closed(self, parts: tuple[torch.Tensor, ...]) -> Cut:
        return self.kind(parts, self.dim, self.widths, self.team, self.origins)


def opened(tree: Any) -> Any:
    """Replace every Cut in a structure by (its parts, what it was)."""
    return pytree.tree_map(lambda v: (v.parts, _Cover(v)) if isinstance(v, Cut) else v, tree)


def closed(tree: Any) -> Any:
    """Undo ``opened``; the parts may be other tensors by now."""

    def close(value: Any) -> Any:
        return value[1].closed(tuple(value[0])) if _is_opened(value) else value

    return pytree.tree_map(close, tree, is_leaf=_is_opened)


def _is_opened(value: Any) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and isinstance(value[1], _Cover)
