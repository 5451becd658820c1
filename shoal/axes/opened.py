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
    """What an opened Cut was besides its parts; no tensor, so that nobody takes it for one, and it keeps none alive."""

    def __init__(self, cut: Cut) -> None:
        self._kind = type(cut)
        self._rest = {name: value for name, value in vars(cut).items() if name != "parts"}

    def closed(self, parts: tuple[torch.Tensor, ...]) -> Cut:
        made = self._kind(parts, self._rest["split_dim"], self._rest["widths"], self._rest["team"])
        vars(made).update(self._rest)
        return made


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
