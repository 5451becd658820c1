"""What follows from the scalar products of L-BFGS's vectors: the coordinator's part, which sees no parameters.

The basis is s_0 … s_9, y_0 … y_9, the last direction, the last gradient, the gradient. A vector is a row of coefficients over
it, and ``u @ products @ v`` is the scalar product of two (Chen et al. 2014, "Large-scale L-BFGS using MapReduce").
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
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
_FLAT, _STILL = 1e-7, 1e-9
"""torch's tolerances, of the largest gradient and of the slope along the direction."""


@dataclass(frozen=True)
class Move:
    """A step, as whoever has a part of the vectors makes it.

    Attributes:
        coefficients: of the new direction over the basis; none: nothing moves.
        pair: which pair (s, y) is made of the last step; -1 where none is.
        last_length, length: of the last step and of this one, in directions.
    """

    coefficients: tuple[float, ...] = ()
    pair: int = -1
    last_length: float = 0.0
    length: float = 0.0

    def numbers(self) -> dict[str, Any]:
        """As hyperparameters of ``BatchLBFGS``, always as many."""
        return {
            "moves": int(bool(self.coefficients)), "coefficients": self.coefficients or (0.0,) * SIZE, "pair": self.pair,
            "lengths": (self.last_length, self.length),
        }  # fmt: skip

    @classmethod
    def from_numbers(cls, numbers: Mapping[str, Any]) -> Move:
        """The other way; ValueError where they are none."""
        found = tuple(numbers["coefficients"]) if numbers["moves"] else ()
        pair = int(numbers["pair"])
        if len(found) not in (0, SIZE) or not -1 <= pair < HISTORY:
            raise ValueError(f"{len(found)} coefficients and pair {pair} are no step")
        return cls(found, pair, *numbers["lengths"])


class BatchLBFGS(torch.optim.Optimizer):
    """What ``optimizer="lbfgs"`` stands for. A server that has parameters of its own makes a ``Move`` with it."""

    def __init__(self, params: Any, lr: float = 1.0) -> None:
        super().__init__(params, {"lr": lr, **Move().numbers(), "page": (0.0,) * PAGE})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move by what the groups say. ValueError, and nothing has moved, where that is no step."""
        for group, made in [(group, Move.from_numbers(group)) for group in self.param_groups]:
            for parameter in group["params"]:
                gradient = parameter.grad if parameter.grad is not None else torch.zeros_like(parameter)
                move(parameter, vectors_of(self, parameter), gradient, made)


def vectors_of(optimizer: torch.optim.Optimizer, parameter: torch.Tensor) -> list[torch.Tensor]:
    """What is remembered of a parameter, in the order of ``STATE_KEYS``: zeros in the beginning."""
    state = optimizer.state[parameter]
    if not state:
        state.update({key: torch.zeros_like(parameter) for key in STATE_KEYS})
    return [state[key] for key in STATE_KEYS]


def move(weights: torch.Tensor, states: Sequence[torch.Tensor], gradient: torch.Tensor, made: Move) -> None:
    """Make a step with a part of all vectors; ``states``: in the order of ``STATE_KEYS``. All but the gradient are changed."""
    if not made.coefficients:
        return
    direction = torch.zeros_like(gradient)
    for weight, vector in zip(made.coefficients, [*states, gradient], strict=True):
        if weight:
            direction.add_(vector, alpha=weight)
    if made.pair >= 0:
        states[made.pair].copy_(states[LAST_DIRECTION] * made.last_length)
        states[HISTORY + made.pair].copy_(gradient - states[LAST_GRADIENT])
    states[LAST_DIRECTION].copy_(direction)
    states[LAST_GRADIENT].copy_(gradient)
    if made.length:
        weights.add_(direction, alpha=made.length)


def multiply(parts: Iterable[Sequence[torch.Tensor]]) -> np.ndarray:
    """The scalar products of all vectors, SIZE × SIZE, and of the gradient the sum of its numbers' sizes and the largest.

    Args:
        parts: parts of all vectors: those of ``STATE_KEYS``, and the gradient.
    """
    found = np.zeros(SIZE * SIZE + 2)
    matrix = found[: SIZE * SIZE].reshape(SIZE, SIZE)
    for part in parts:
        basis = torch.stack([vector.reshape(-1) for vector in part]).double()
        matrix += (basis @ basis.T).numpy()
        found[L1] += float(basis[NOW].abs().sum())
        found[LARGEST] = max(found[LARGEST], float(basis[NOW].abs().max()))
    return found


def direct(found: np.ndarray, page: np.ndarray, lr: float) -> Move:
    """From the products of all servers, a row each as ``multiply`` gives them, to the step; ``page`` is brought up to it."""
    products = found[:, : SIZE * SIZE].sum(0).reshape(SIZE, SIZE)
    l1, largest = float(found[:, L1].sum()), float(found[:, LARGEST].max())
    if largest <= _FLAT:
        return Move()
    last_length = float(page[LENGTH])
    page[ITERATION] += 1
    coefficients, pair = combine(products, page)
    slope = coefficients @ products[:, NOW]
    page[LENGTH] = (min(1.0, 1.0 / l1) if page[ITERATION] == 1 else 1.0) * lr
    length = float(page[LENGTH]) if slope <= -_STILL else 0.0
    return Move(tuple(map(float, coefficients)), pair, last_length, length)


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
