"""The generated clicks: the same everywhere, by power laws, with an AUC that can be reached."""

from __future__ import annotations

import numpy as np
import torch
from torchmetrics.classification import BinaryAUROC

from shoal.jobs.recsys.clicks import FIELDS, clicks


def test_same_seed_same_rows() -> None:
    one, again, other = clicks(1000, seed=1), clicks(1000, seed=1), clicks(1000, seed=2)
    assert np.array_equal(one.ids, again.ids) and np.array_equal(one.clicked, again.clicked)
    assert not np.array_equal(one.ids, other.ids)


def test_ids_are_within_their_fields() -> None:
    ids = clicks(5000, seed=1).ids
    assert ids.dtype == np.int64 and ids.shape == (5000, 5)
    assert (ids >= 0).all() and (ids < np.array(list(FIELDS.values()))).all()


def test_item_keeps_its_category() -> None:
    both = np.concatenate([clicks(5000, seed=seed).ids for seed in (1, 2)])
    pairs = {(item, category) for item, category in both[:, 1:3].tolist()}
    assert len(pairs) == len({item for item, _ in pairs})


def test_few_items_make_most_rows() -> None:
    counts = np.sort(np.bincount(clicks(20_000, seed=1).ids[:, 1], minlength=FIELDS["item"]))[::-1]
    assert counts[: FIELDS["item"] // 10].sum() > 0.6 * counts.sum()


def test_planted_probability_gives_the_documented_auc() -> None:
    made = clicks(50_000, seed=2)
    auc = BinaryAUROC()(torch.from_numpy(made.probability), torch.from_numpy(made.clicked).int())
    assert abs(auc.item() - 0.807) < 0.005
    assert abs(made.clicked.mean() - made.probability.mean()) < 0.01
