"""What follows from the scalar products of L-BFGS's vectors: the coordinator's part, which sees no parameters.

The basis is s_0 … s_9, y_0 … y_9, the last direction, the last gradient, the gradient. A vector is a row of coefficients over
it, and ``u @ products @ v`` is the scalar product of two (Chen et al. 2014, "Large-scale L-BFGS using MapReduce").
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

HISTORY = 10
DIRECTION, GRADIENT = "lbfgs.direction", "lbfgs.gradient"
STATE_KEYS = (
    *(f"lbfgs.s{k}" for k in range(HISTORY)), *(f"lbfgs.y{k}" for k in range(HISTORY)), DIRECTION, GRADIENT,
)  # fmt: skip
LAST_DIRECTION, LAST_GRADIENT, NOW = 2 * HISTORY, 2 * HISTORY + 1, 2 * HISTORY + 2
SIZE = 2 * HISTORY + 3
L1, LARGEST = SIZE * SIZE, SIZE * SIZE + 1
ITERATION, LENGTH, PAIRS, SCALE, FIRST = range(5)
PAGE = 8 + HISTORY
_CURVATURE = 1e-10


class BatchLBFGS(torch.optim.Optimizer):
    """What ``optimizer="lbfgs"`` stands for; it never steps itself."""

    def __init__(self, params: Any, lr: float = 1.0) -> None:
        super().__init__(params, {"lr": lr})

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Servers do that."""
        raise NotImplementedError("L-BFGS runs on parameter servers")


def products_bytes(servers: int) -> int:
    """Bytes of the arena's ``products`` region."""
    return servers * (SIZE * SIZE + 2 + 2 * PAGE) * 8


def combine(products: np.ndarray, page: np.ndarray) -> tuple[np.ndarray, int]:
    """The two-loop recursion (Nocedal 1980).

    Args:
        products: SIZE × SIZE.
        page: what is remembered of the steps before; it is brought up to this one.

    Returns the new direction's coefficients, and which pair (s, y) is made of the last step; -1 where none is.
    """
    made = -1

    def unit(index: int) -> np.ndarray:
        found = np.zeros(SIZE)
        found[index] = 1.0
        return found

    if page[ITERATION] == 1:
        page[PAIRS], page[SCALE] = 0, 1.0
        return -unit(NOW), -1
    pairs, first = int(page[PAIRS]), int(page[FIRST])
    old = [(unit(k % HISTORY), unit(HISTORY + k % HISTORY)) for k in range(first, first + pairs)]
    s, y = page[LENGTH] * unit(LAST_DIRECTION), unit(NOW) - unit(LAST_GRADIENT)
    curvature = float(y @ products @ s)
    if curvature > _CURVATURE:
        if pairs == HISTORY:
            old.pop(0)
            page[FIRST] = (first + 1) % HISTORY
        old.append((s, y))
        made = (first + pairs) % HISTORY
        page[PAIRS] = len(old)
        page[SCALE] = curvature / float(y @ products @ y)
    q = -unit(NOW)
    alphas = []
    for s, y in reversed(old):
        alphas.append(float(s @ products @ q) / float(y @ products @ s))
        q = q - alphas[-1] * y
    r = q * page[SCALE]
    for (s, y), alpha in zip(old, reversed(alphas), strict=True):
        r = r + s * (alpha - float(y @ products @ r) / float(y @ products @ s))
    return r, made
