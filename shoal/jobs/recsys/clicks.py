"""Clicks made by a known model, so that a recommender has data without a download.

A row is one time an item was shown: (user, item, category, hour, device) and whether it was clicked. Users
and items are drawn by power laws (a few of each make most of the rows, as in real logs); an item has one
category. Whether somebody clicks is drawn from the planted probability

    sigmoid(−1.5 + user bias + item bias + <user taste, item taste> + (category, hour) effect)

Since the probability is known, so is the best AUC that any model can reach. NumPy's ``RandomState`` is used
because its streams are frozen: the same rows on every machine.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

FIELDS = {"user": 20_000, "item": 5_000, "category": 50, "hour": 24, "device": 4}  # field -> number of ids
_TASTES = 4


@dataclass(frozen=True)
class Clicks:
    """Rows of the log.

    Attributes:
        ids: int64 of shape (rows, 5), one column a field, in the order of ``FIELDS``, each from 0.
        clicked: float32 of shape (rows,), 1.0 where it was clicked.
        probability: float32 of shape (rows,), the planted probability of a click.
    """

    ids: np.ndarray
    clicked: np.ndarray
    probability: np.ndarray


def clicks(rows: int, seed: int, world_seed: int = 0) -> Clicks:
    """Return ``rows`` rows; ``world_seed`` fixes users and items, ``seed`` which of them meet."""
    world = np.random.RandomState(world_seed)
    user_bias = 0.5 * world.standard_normal(FIELDS["user"])
    item_bias = 1.2 * world.standard_normal(FIELDS["item"])
    user_taste = 0.6 * world.standard_normal((FIELDS["user"], _TASTES))
    item_taste = 0.6 * world.standard_normal((FIELDS["item"], _TASTES))
    item_category = world.randint(0, FIELDS["category"], FIELDS["item"])
    category_hour = 0.5 * world.standard_normal((FIELDS["category"], FIELDS["hour"]))

    draw = np.random.RandomState(seed)
    user = _power_law(draw, FIELDS["user"], rows, exponent=0.8)
    item = _power_law(draw, FIELDS["item"], rows, exponent=1.0)
    category = item_category[item]
    hour = draw.randint(0, FIELDS["hour"], rows)
    device = draw.randint(0, FIELDS["device"], rows)
    score = -1.5 + user_bias[user] + item_bias[item] + category_hour[category, hour]
    score = score + (user_taste[user] * item_taste[item]).sum(axis=1)
    probability = 1.0 / (1.0 + np.exp(-score))
    clicked = draw.random_sample(rows) < probability
    ids = np.stack([user, item, category, hour, device], axis=1).astype(np.int64)
    return Clicks(ids, clicked.astype(np.float32), probability.astype(np.float32))


def _power_law(draw: np.random.RandomState, size: int, rows: int, exponent: float) -> np.ndarray:
    """Return ids below ``size``, id i with a probability proportional to (i + 1) ** −exponent."""
    cumulative = np.cumsum(np.arange(1, size + 1, dtype=np.float64) ** -exponent)
    return np.searchsorted(cumulative, draw.random_sample(rows) * cumulative[-1], side="right")
