from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from small_store import Ranks

from shoal.comm.store import NOTEBOOK_BYTES, RING_STEPS, Columns
from shoal.errors import JobError


@pytest.fixture
def ranks() -> Iterator[Ranks]:
    made = Ranks(lambda model: torch.optim.Adam(model.parameters()), 3)
    yield made
    made.close()


def test_a_notebook_keeps_the_pages_of_this_step_and_the_one_before(ranks: Ranks) -> None:
    store = ranks.store
    assert store.read_notebook(0, 0) is None
    for step in range(5):
        for rank in range(3):
            store.write_notebook(rank, step, {"step": step, "rank": rank, "filling": "x" * (20 - step)})
    for rank in range(3):
        for step in (3, 4):
            assert store.read_notebook(rank, step) == {"step": step, "rank": rank, "filling": "x" * (20 - step)}


def test_what_does_not_fit_into_a_notebook_is_refused_and_harms_nothing(ranks: Ranks) -> None:
    ranks.store.write_notebook(1, 4, "kept")
    with pytest.raises(JobError, match="keep large values out"):
        ranks.store.write_notebook(1, 4, b"x" * NOTEBOOK_BYTES)
    assert ranks.store.read_notebook(1, 4) == "kept"


def test_gradients_buffers_state_and_records_do_not_overlap(ranks: Ranks) -> None:
    store, table = ranks.store, ranks.store.table
    views: list[torch.Tensor] = list(store.weights)
    views += [store.gradient(rank, k) for rank in range(3) for k in range(len(table.trained))]
    views += [store.buffer(parity, k) for parity in (0, 1) for k in range(len(table.buffers))]
    views += [
        store.state_range(k, spec.offset, spec.offset + spec.nbytes, spec.dtype)
        for k in range(len(table.state_keys))
        for spec in table.trained
    ]
    views += [getter(rank) for getter in (store.scalar_bytes, store.undo_bytes) for rank in range(3)]
    for number, view in enumerate(views):
        view.fill_(number % 100)
    for number, view in enumerate(views):
        assert (view == number % 100).all()


def test_records_are_a_ring(ranks: Ranks) -> None:
    ranks.store.record(1, 5)[Columns.LOSS] = 2.0
    assert ranks.store.record(1, 5 + RING_STEPS)[Columns.LOSS] == 2.0
    assert ranks.store.record(1, 6)[Columns.LOSS] == ranks.store.record(2, 5)[Columns.LOSS] == 0.0


def test_the_state_dict_is_the_models_own(ranks: Ranks) -> None:
    found = ranks.store.state_dict(0)
    expected = ranks.model.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
