"""MovieLens-100K as a recommender sees it: keys of what is known when a film is shown, and whether it was liked (4 stars or 5).

Keys are 64-bit: the field in the upper bits, the value in the lower 40. A row has person, film, age (in fives), sex,
occupation, and up to six genres, the rest of them 0. Rows are in the order of time; the first four fifths are to train on.
"""

from __future__ import annotations

import functools
import sys

import numpy as np
import torch

from shoal.data import movielens

SINGLE, GENRES = 5, 6
TRAINED = 80_000


def key(field: int, value: np.ndarray) -> np.ndarray:
    """The keys of a field's values; no key is 0."""
    return (np.int64(field + 1) << np.int64(40)) + value.astype(np.int64)


@functools.lru_cache(maxsize=1)
def rows() -> tuple[torch.Tensor, torch.Tensor]:
    """(keys int64 (100000, 11), liked float32 (100000,)) in the order of time."""
    data = movielens.load(_say)
    ratings = np.asarray(data.ratings)
    person, film = ratings[:, 0], ratings[:, 1]
    age, sex, occupation = np.asarray(data.people)[person - 1].T
    fields = [person, film, age // 5, sex, occupation]
    keys = np.zeros((len(ratings), SINGLE + GENRES), np.int64)
    for column, values in enumerate(fields):
        keys[:, column] = key(column, values)
    genres = np.zeros((len(data.films), GENRES), np.int64)
    for number, flags in enumerate(np.asarray(data.films)):
        own = np.flatnonzero(flags)
        genres[number, : len(own)] = key(SINGLE, own)
    keys[:, SINGLE:] = genres[film - 1]
    return torch.from_numpy(keys), torch.from_numpy((ratings[:, 2] >= 4).astype(np.float32))


def train_data() -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first 80,000 rows."""
    keys, liked = rows()
    return keys[:TRAINED], liked[:TRAINED]


def eval_data() -> tuple[torch.Tensor, torch.Tensor]:
    """Return the 20,000 that came after them."""
    keys, liked = rows()
    return keys[TRAINED:], liked[TRAINED:]


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
