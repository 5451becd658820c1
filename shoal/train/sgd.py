"""Plain SGD over a chunk with one pass through memory: gradients are summed, weights saved and changed block by block.

Taken where it gives every bit that torch's kernel gives, which is tried first (``shoal.comm.dense.steps_as_torch``). The
undo log then grows with the step: the note UNDO_BYTES says how many of the chunk's first bytes it holds, and what lies
beyond them has not been changed yet. UNDO_LINES says PARTLY meanwhile, before CHUNK_SAVED names the chunk.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from shoal.comm.dense import SgdStep, load, rates, steps_as_torch

PARTLY = -2


def is_plain(group: dict[str, Any]) -> bool:
    """Whether this is a group of SGD's without anything beside a learning rate."""
    others = any(group.get(key) for key in ("momentum", "weight_decay", "maximize", "nesterov", "differentiable"))
    return not others and isinstance(group["lr"], (int, float))


class SgdChunk:
    """The weights of one chunk, to be stepped as a whole.

    Args:
        weights: 1-D, all of the chunk.
        spans: first and last byte (exclusive) of each piece in it.
        groups: of each piece, the index of its group among the optimizer's.
    """

    def __init__(self, weights: torch.Tensor, spans: Sequence[tuple[int, int]], groups: Sequence[int]) -> None:
        self._dense = load()
        self._weights = weights
        self._spans = np.array(spans, dtype=np.int64) // weights.element_size()
        self._groups = groups
        self._learning_rates: list[float] = []
        self._rates = rates([], weights.dtype) if weights.dtype in self._dense.steps else np.empty(0)

    def fits(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether an optimizer's step is this one, bit for bit."""
        return type(optimizer) is torch.optim.SGD and all(
            is_plain(group) and steps_as_torch(self._weights.dtype, group.get("fused"), group.get("foreach"))
            for group in optimizer.param_groups
        )

    def step(
        self, optimizer: torch.optim.Optimizer, stripes: Sequence[torch.Tensor], factor: float, scale: float,
        undo: torch.Tensor | None, saved: int,
    ) -> None:  # fmt: skip
        """Step with the stripes' sum times factor and scale; ``undo`` and ``saved``: see ``SgdStep``."""
        learning_rates = [optimizer.param_groups[group]["lr"] for group in self._groups]
        if learning_rates != self._learning_rates:
            self._learning_rates, self._rates = learning_rates, rates(learning_rates, self._weights.dtype)
        step = SgdStep(spans=self._spans, rates=self._rates, factor=factor, scale=scale, undo=undo, saved=saved)
        self._dense.sgd(self._weights, stripes, step)
