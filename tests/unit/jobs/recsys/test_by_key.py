"""The recommenders whose rows are found by key: what their rows are made of, and that they learn."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from torchmetrics.functional.classification import binary_auroc

from shoal import ps
from shoal.jobs.recsys import criteo, deepfm, wide_deep


def test_the_stream_has_criteos_form_and_is_the_same_every_time() -> None:
    rows = criteo.generate(20_000, seed=3)
    assert rows.numbers.shape == (20_000, 13) and rows.keys.shape == (20_000, 26)
    values = rows.keys & ((1 << 40) - 1)
    assert (rows.keys >> 40 == np.arange(1, 27)).all() and values.min() > 0 and values.max() > 2**39
    counts = np.unique(rows.keys[:, -1], return_counts=True)[1]
    assert len(counts) > 4_000 and counts.max() > 1_000
    assert 0.1 < rows.clicked.mean() < 0.6 and abs(rows.clicked.mean() - rows.probability.mean()) < 0.02
    np.testing.assert_array_equal(criteo.generate(20_000, seed=3).keys, rows.keys)
    assert not np.array_equal(criteo.generate(20_000, seed=3, start=20_000).keys, rows.keys)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    # Threads of so small a model only wait for each other where other processes run.
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_both_models_learn_what_was_planted() -> None:
    train, held = criteo.generate(12_000, seed=1), criteo.generate(6_000, seed=2)
    torch.manual_seed(0)
    models = (
        wide_deep.WideDeep(single=criteo.CATEGORICAL - 1),
        deepfm.DeepFM(single=criteo.CATEGORICAL - 1, numeric=criteo.NUMERIC),
    )
    best = float(binary_auroc(torch.from_numpy(held.probability), torch.from_numpy(held.clicked).int()))
    for model in models:
        optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)

        def predict(rows: criteo.CriteoRows, at: slice, model: torch.nn.Module = model) -> torch.Tensor:
            keys, numbers = torch.from_numpy(rows.keys[at]), torch.from_numpy(rows.numbers[at])
            return model(keys, numbers) if isinstance(model, deepfm.DeepFM) else model(keys)

        for start in range(0, 12_000, 500):
            at = slice(start, start + 500)
            optimizer.zero_grad()
            F.binary_cross_entropy_with_logits(predict(train, at), torch.from_numpy(train.clicked[at])).backward()
            optimizer.step()
            ps.step(model)
        with torch.no_grad():
            reached = float(binary_auroc(predict(held, slice(None)), torch.from_numpy(held.clicked).int()))
        assert 0.6 < reached <= best < 0.95, (reached, best)
