"""How far answers may be from those of the model as it is. Nothing is further away than its owner has said.

Without a declared tolerance a model is computed exactly as it was written. With one, cheaper ways to compute it are tried at the
start (``shoal.serve.precision``), and those whose answers stay within it may be taken.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from shoal.errors import RequestError

_NONE = "none"


@dataclass(frozen=True)
class Tolerance:
    """At least one of the two is given.

    Attributes:
        cosine: the least cosine between a row of an output and the exact one.
        max_error: the largest absolute difference of a number in an output.
    """

    cosine: float | None = None
    max_error: float | None = None

    @classmethod
    def parse(cls, text: str) -> Tolerance:
        """From ``cosine=0.99``, ``max_error=0.01``, or both with a comma; ``none``: exact. RequestError for anything else."""
        pairs = [] if text == _NONE else [part.partition("=") for part in text.split(",")]
        return cls.of({name.strip(): value for name, _, value in pairs}, f"The tolerance {text[:80]!r}")

    @classmethod
    def of(cls, described: Any, what: str = 'The "tolerance" of the bundle') -> Tolerance:
        """From a mapping, as bundle.json has it; nothing in it (or None) means exact. RequestError for anything else."""
        wrong = RequestError(f'{what} is not understood; write "cosine=0.99", "max_error=0.01", or both with a comma.')
        described = {} if described is None else described
        if not isinstance(described, Mapping) or not set(described) <= {"cosine", "max_error"}:
            raise wrong
        try:
            found = {name: float(value) for name, value in described.items()}
        except (TypeError, ValueError):
            raise wrong from None
        if not 0 < found.get("cosine", 1.0) <= 1:
            raise RequestError(f"{what} has a cosine that is not above 0 and at most 1.")
        if not 0 < found.get("max_error", 1.0) < float("inf"):
            raise RequestError(f"{what} has a largest error that is not above 0.")
        return cls(**found)

    @property
    def exact(self) -> bool:
        """Whether nothing may differ."""
        return self.cosine is None and self.max_error is None

    def __str__(self) -> str:
        said = [f"cosine ≥ {self.cosine:g}"] if self.cosine is not None else []
        said += [f"error ≤ {self.max_error:g}"] if self.max_error is not None else []
        return " and ".join(said) or _NONE

    def refuses(self, distance: Distance) -> bool:
        """Whether answers are further away than they may be."""
        return (
            not distance.comparable
            or (self.cosine is not None and not distance.cosine >= self.cosine)
            or (self.max_error is not None and not distance.max_error <= self.max_error)
        )


@dataclass(frozen=True)
class Distance:
    """How far some answers are from the exact ones: the worst row and the worst number.

    ``comparable``: whole numbers are the same, what is not finite is so in both.
    """

    cosine: float = 1.0
    max_error: float = 0.0
    comparable: bool = True

    @classmethod
    def between(cls, exact: Sequence[np.ndarray], found: Sequence[np.ndarray]) -> Distance:
        """Of outputs, ``[rows, …]`` each; what is of no floating type has to be equal."""
        worst = cls()
        for one, other in zip(exact, found, strict=True):
            if one.shape != other.shape or one.dtype.kind != "f":
                worst = worst.worse(cls(comparable=bool(np.array_equal(one, other))))
            else:
                worst = worst.worse(cls._of_floats(one.astype(np.float64), other.astype(np.float64)))
        return worst

    @classmethod
    def _of_floats(cls, one: np.ndarray, other: np.ndarray) -> Distance:
        finite = np.isfinite(one)
        if not np.array_equal(finite, np.isfinite(other)) or one.size == 0:
            return cls(comparable=one.size == 0)
        one, other = (np.where(finite, rows, 0.0).reshape(len(one), -1) for rows in (one, other))
        lengths = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
        # A row of zeros points nowhere: then all that counts is the error.
        cosines = np.where(lengths > 0, (one * other).sum(1) / np.where(lengths > 0, lengths, 1.0), 1.0)
        return cls(float(cosines.min()), float(np.abs(one - other).max()))

    def worse(self, other: Distance) -> Distance:
        """The worse of two in each respect."""
        return Distance(
            min(self.cosine, other.cosine),
            max(self.max_error, other.max_error),
            self.comparable and other.comparable,
        )

    def __str__(self) -> str:
        return f"cosine ≥ {self.cosine:.5f}, error ≤ {self.max_error:.2g}" if self.comparable else "other answers"
