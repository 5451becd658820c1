"""Rows of class scores as probabilities and names."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_SUM_TOLERANCE = 1e-3


def probabilities(scores: np.ndarray) -> np.ndarray:
    """``[rows, classes]`` as probabilities: rows that are some already (none below 0, their sum 1) stay, others get a softmax."""
    scores = scores.astype(np.float64)
    with np.errstate(all="ignore"):
        powers = np.exp(scores - scores.max(axis=1, keepdims=True))
        softmax = powers / powers.sum(axis=1, keepdims=True)
        are_some = (scores >= 0).all(axis=1) & (abs(scores.sum(axis=1) - 1) < _SUM_TOLERANCE)
    found: np.ndarray = np.where(are_some[:, None], scores, softmax)
    return found


def top(scores: np.ndarray, labels: Sequence[str] | None, most: int) -> list[tuple[str, float]]:
    """The classes of one row of scores that are most probable, the best first: (name, or number without names; probability)."""
    row = probabilities(scores[None])[0]
    best = np.argsort(-row, kind="stable")[:most].tolist()
    return [(labels[k] if labels is not None and k < len(labels) else str(k), float(row[k])) for k in best]
