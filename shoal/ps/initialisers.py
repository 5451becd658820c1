"""First values of rows: functions of (seed, key, position) alone, so nobody has to be asked and no order matters.

They are made of integers until the last step (row_math.c, fallback.py), so they have the same bits on any machine.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True)
class Initialiser:
    """What the kinds share. ``code``: what row_math.c calls it; ``numbers``: its two parameters."""

    code: ClassVar[int] = 0

    def numbers(self) -> tuple[float, float]:
        return 0.0, 0.0


@dataclass(frozen=True)
class Zeros(Initialiser):
    """All weights 0."""


@dataclass(frozen=True)
class Constant(Initialiser):
    """All weights ``value``."""

    value: float = 0.0
    code: ClassVar[int] = 1

    def numbers(self) -> tuple[float, float]:
        return self.value, 0.0


@dataclass(frozen=True)
class Uniform(Initialiser):
    """Uniform in [low, high)."""

    low: float = -0.05
    high: float = 0.05
    code: ClassVar[int] = 2

    def numbers(self) -> tuple[float, float]:
        return self.low, self.high


@dataclass(frozen=True)
class Normal(Initialiser):
    """Normal with this deviation and mean 0, as the sum of twelve uniform numbers: never beyond six deviations."""

    std: float = 0.05
    code: ClassVar[int] = 3

    def numbers(self) -> tuple[float, float]:
        return 0.0, self.std
