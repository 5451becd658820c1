"""Optimizers of single rows: what becomes of a row's weights when its gradient comes in.

All of them are *lazy*: a row that has no gradient in a step is not touched, so momentum does not coast and nothing decays
meanwhile. For SGD without momentum, both Adagrads and FTRL this is exactly what updating the whole table would give.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from shoal.errors import JobError


def _check(kind: str, **numbers: tuple[float, bool]) -> None:
    for name, (value, fine) in numbers.items():
        if not isinstance(value, (int, float)) or not math.isfinite(value) or not fine:
            raise JobError(f"{kind}({name}={value!r}) is no optimizer for rows; give a finite number in its range.")


@dataclass(frozen=True, kw_only=True)
class RowOptimizer:
    """What the kinds share. ``code``: what row_math.c calls it; ``numbers``: its hyperparameters in that order."""

    lr: float = 0.05
    code: ClassVar[int] = -1

    def state(self, width: int) -> int:
        """How many numbers a row of so many weights keeps beside them."""
        raise NotImplementedError

    def numbers(self) -> tuple[float, ...]:
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class SGD(RowOptimizer):
    """w ← w − lr · g; with momentum b ← momentum · b + g and w ← w − lr · b, as ``torch.optim.SGD``, lazily."""

    momentum: float = 0.0
    code: ClassVar[int] = 0

    def __post_init__(self) -> None:
        _check("SGD", lr=(self.lr, self.lr >= 0), momentum=(self.momentum, 0 <= self.momentum < 1))

    def state(self, width: int) -> int:
        return width if self.momentum else 0

    def numbers(self) -> tuple[float, ...]:
        return self.lr, self.momentum


@dataclass(frozen=True, kw_only=True)
class Adagrad(RowOptimizer):
    """s ← s + g²; w ← w − lr · g / (√s + eps), as ``torch.optim.Adagrad``."""

    eps: float = 1e-10
    initial_accumulator_value: float = 0.0
    code: ClassVar[int] = 1

    def __post_init__(self) -> None:
        first = self.initial_accumulator_value
        _check(type(self).__name__, lr=(self.lr, self.lr >= 0), eps=(self.eps, self.eps > 0),
               initial_accumulator_value=(first, first >= 0))  # fmt: skip

    def state(self, width: int) -> int:
        return width

    def numbers(self) -> tuple[float, ...]:
        return self.lr, self.eps, self.initial_accumulator_value


@dataclass(frozen=True, kw_only=True)
class RowWiseAdagrad(Adagrad):
    """Adagrad with one sum for a row: s ← s + mean(g²). Rows are nearly half as large (FBGEMM, TorchRec)."""

    code: ClassVar[int] = 2

    def state(self, width: int) -> int:
        return 1


@dataclass(frozen=True, kw_only=True)
class Adam(RowOptimizer):
    """Lazy Adam, as ``torch.optim.SparseAdam``: moments move only where there is a gradient, the correction counts all steps."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    code: ClassVar[int] = 3

    def __post_init__(self) -> None:
        first, second = self.betas
        _check("Adam", lr=(self.lr, self.lr >= 0), eps=(self.eps, self.eps > 0),
               betas_0=(first, 0 <= first < 1), betas_1=(second, 0 <= second < 1))  # fmt: skip

    def state(self, width: int) -> int:
        return 2 * width

    def numbers(self) -> tuple[float, ...]:
        return self.lr, *self.betas, self.eps


@dataclass(frozen=True, kw_only=True)
class FTRL(RowOptimizer):
    """FTRL-Proximal (McMahan et al. 2013, "Ad Click Prediction", algorithm 1): with ``l1`` most weights stay exactly 0.

    ``lr`` is the paper's α. Rows should begin at zero (``init=shoal.ps.Zeros()``): its first step forgets what they were.
    """

    beta: float = 1.0
    l1: float = 0.0
    l2: float = 0.0
    code: ClassVar[int] = 4

    def __post_init__(self) -> None:
        _check("FTRL", lr=(self.lr, self.lr > 0), beta=(self.beta, self.beta >= 0), l1=(self.l1, self.l1 >= 0),
               l2=(self.l2, self.l2 >= 0))  # fmt: skip

    def state(self, width: int) -> int:
        return 2 * width

    def numbers(self) -> tuple[float, ...]:
        return self.lr, self.beta, self.l1, self.l2
