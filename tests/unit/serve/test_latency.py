"""What a batch takes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.serve.latency import LatencyModel


def test_lines_between_what_was_measured() -> None:
    model = LatencyModel.from_measured({1: 1.0, 4: 2.5, 8: 3.0})
    assert [model.predict(size) for size in (1, 2, 4, 6, 8)] == [1.0, 1.5, 2.5, 2.75, 3.0]
    assert model.predict(16) == 6.0


def test_best_batch_is_the_smallest_near_the_best_rate() -> None:
    assert LatencyModel.from_measured({1: 1.0, 2: 1.0, 4: 1.98, 8: 3.95}).best_batch(8) == 2
    assert LatencyModel.from_measured({1: 1.0, 2: 1.0, 8: 1.0}).best_batch(4) == 2
    assert LatencyModel.from_measured({1: 1.0, 2: 1.95, 4: 3.9}).best_batch(8) == 1


@given(st.integers(1, 12), st.floats(0.2, 5.0))
def test_learns_what_it_sees(batch: int, factor: float) -> None:
    measured = {1: 1.0, 2: 1.5, 4: 2.0, 8: 3.0}
    model = LatencyModel.from_measured(measured)
    truth = model.predict(batch) * factor
    for _ in range(400):
        model.update(batch, truth)
    assert model.predict(batch) == pytest.approx(truth, rel=0.02)


def test_one_outlier_changes_little() -> None:
    model = LatencyModel.from_measured({1: 1.0})
    model.update(1, 1000.0)
    assert model.predict(1) < 1.2


def test_cheapest_batch_is_the_largest_near_the_best_rate() -> None:
    assert LatencyModel.from_measured({1: 1.0, 2: 1.0, 4: 1.98, 8: 5.0}).cheapest_batch(8) == 4
    assert LatencyModel.from_measured({1: 1.0, 2: 1.0, 4: 1.98, 8: 3.95}).cheapest_batch(2) == 2
    assert LatencyModel.from_measured({1: 1.0, 2: 2.2, 4: 5.0}).cheapest_batch(8) == 1
