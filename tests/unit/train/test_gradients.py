from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import nn

from shoal import ps
from shoal.comm import dense
from shoal.comm.arena import Arena
from shoal.comm.grid import Grid
from shoal.comm.store import Store, arena_layout
from shoal.ps import outbox
from shoal.train.describe import describe
from shoal.train.embedding import quicken_embeddings
from shoal.train.gradients import Gradients, SparseRows, Target, find_bad
from shoal.train.row_tables import RowGradients
from shoal.train.split import Ways, split_table


class Tied(nn.Module):
    """What two stages of a pipeline have of a model with a tied weight, in one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.late = nn.Parameter(torch.randn(5, 3)), nn.Parameter(torch.randn(3))


GRID = Grid(dp=2, pp=2)


@pytest.fixture
def store() -> Iterator[Store]:
    model = Tied()
    base = describe(model, torch.optim.SGD(model.parameters(), lr=0.1))
    table, _ = split_table(base, GRID, Ways({"table": [0, 1], "late": [1]}, {}), "SGD")
    arena = Arena.create(arena_layout(table, GRID))
    yield Store(arena, table)
    arena.memory.close()


def index_of(store: Store, name: str) -> int:
    return next(k for k, spec in enumerate(store.table.parameters) if spec.name == name)


def test_what_was_seen_to_be_finite_is_not_looked_at_again(store: Store) -> None:
    model, at = Tied(), index_of(store, "table")
    gradients, everybody = Gradients(store, 1, [Target(model.table, at)]), np.ones(len(store.table.trained), bool)

    def bad() -> str | None:
        return find_bad(store, 1, everybody, gradients.finite)

    (model.table * 1.0).sum().backward()
    assert gradients.finite[at] or not dense.load().steps
    assert bad() is None
    # What is added up is looked at anew, and may be no number though its parts were.
    for _ in range(2):
        (model.table * 2.0e38).sum().backward()
    assert not gradients.finite[at] and bad() == "table"
    store.touched[1] = 0
    gradients.begin()
    (model.table * float("nan")).sum().backward()
    assert not gradients.finite[at] and bad() == "table"


def test_gradients_add_up_in_the_stripe_and_leave_the_parameter(store: Store) -> None:
    model, at = Tied(), index_of(store, "table")
    gradients = Gradients(store, 1, [Target(model.table, at)])
    for factor in (1.0, 2.0):
        (model.table * factor).sum().backward()
        assert model.table.grad is None
    assert store.gradient(1, at).unique().tolist() == [3.0]
    assert store.touched[1, at] == 1 and not store.touched[0].any()
    # A new step begins: what is there is of the one before.
    store.touched[1] = 0
    gradients.begin()
    model.table.sum().backward()
    assert store.gradient(1, at).unique().tolist() == [1.0]


def test_marks_say_which_lines_of_a_table_may_not_be_zero() -> None:
    embeddings = quicken_embeddings()
    if embeddings is None:
        pytest.skip("no compiler, or a torch without get_kernel")
    # Rows of 20 bytes share lines, and lie across their borders.
    model = nn.Embedding(3000, 5)
    table = describe(model, torch.optim.SGD(model.parameters(), lr=0.1))
    arena = Arena.create(arena_layout(table, Grid(dp=2)))
    store, target = Store(arena, table), [Target(model.weight, 0)]
    place, marks = store.gradient(1, 0), store.marks(1, 0, table.trained_bytes)
    assert marks is not None and len(marks) * 64 == table.trained_bytes

    def step(*passes: list[int], given: float = 1.0) -> tuple[bool, list[int]]:
        """Whether lines are known, and those that are marked; the stripe is what torch gives."""
        store.touched[1] = 0
        for rows in passes:
            (model(torch.tensor(rows)).sum() * given).backward()
        reached = torch.tensor([row for rows in passes for row in rows])
        expected = torch.zeros(3000, 5).index_add_(0, reached, torch.full((len(reached), 5), given))
        assert torch.equal(place, expected)
        return bool(store.marked[1, 0]), marks.nonzero().view(-1).tolist()

    try:
        gradients = [Gradients(store, 1, target, embeddings=embeddings, marks=True)]
        assert step([7, 7, 2999]) == (True, [2, 937])
        assert step([3, 9]) == (True, [0, 1, 2, 3])
        assert step([4], [8])[0] is False
        assert step([16]) == (True, [5])
        # Whoever takes a worker's place knows nothing of what it has left behind.
        model.weight._post_accumulate_grad_hooks.clear()
        place[1234], marks[:] = 5.0, 1
        gradients.append(Gradients(store, 1, target, embeddings=embeddings, marks=True))
        assert step([0], given=-0.0) == (True, [0])
        assert not store.marked[0].any()
    finally:
        embeddings.end()
        arena.memory.close()


def test_a_second_stage_has_a_place_of_its_own(store: Store) -> None:
    (echo,) = store.table.echoes
    assert store.table.parameters[echo.parameter].name == "table"
    model = Tied()
    gradients = Gradients(store, 0, [Target(model.table, echo=0)])
    (model.table * 4).sum().backward()
    (model.table * 4).sum().backward()
    assert store.echo(0, 0).unique().tolist() == [8.0]
    assert store.echoed[0, 0] == 1 and not store.touched.any()
    gradients.begin()
    assert store.echoed[0, 0] == 0


def test_what_nobody_trains_is_dropped_and_sparse_gradients_become_dense(store: Store) -> None:
    model, at = Tied(), index_of(store, "table")
    Gradients(store, 0, [Target(model.table, at), Target(model.late)])
    rows = nn.functional.embedding(torch.tensor([1, 1, 4]), model.table, sparse=True)
    (rows.sum() + model.late.sum()).backward()
    assert model.late.grad is None and model.table.grad is None
    assert store.gradient(0, at)[:, 0].tolist() == [0.0, 2.0, 0.0, 0.0, 1.0]
    assert store.touched[0].sum() == 1


def test_only_what_was_written_is_cleared_and_nothing_else_is_left() -> None:
    place = torch.full((50, 3), 7.0)
    rows = SparseRows(place, None)
    generator = torch.Generator().manual_seed(0)

    def draw() -> torch.Tensor:
        at = torch.randint(0, 50, (1, 12), generator=generator)
        return torch.sparse_coo_tensor(at, torch.randn(12, 3, generator=generator), (50, 3), check_invariants=True)

    for step in range(6):
        first, second = draw(), draw()
        if step == 3:
            place.copy_(torch.ones(50, 3))
            rows.forget()
        rows.write(first, adds=False)
        assert place.equal(first.to_dense())
        rows.write(second, adds=True)
        torch.testing.assert_close(place, first.to_dense() + second.to_dense())


def test_a_batch_may_be_written_where_the_last_one_was() -> None:
    place, batch = torch.zeros(50, 3), torch.tensor([[4, 9]])
    rows = SparseRows(place, None)
    for first in (4, 14, 24):
        batch.copy_(torch.tensor([[first, first + 5]]))
        rows.write(torch.sparse_coo_tensor(batch, torch.ones(2, 3), (50, 3), check_invariants=True), adds=False)
        assert place[:, 0].nonzero().view(-1).tolist() == [first, first + 5]


def test_rows_that_were_published_can_be_taken_back(store: Store) -> None:
    """As those of a push whose other gradients are no numbers."""
    embedding = ps.Embedding(2)
    table = embedding.table
    try:
        gradients = Gradients(store, 0, [], rows=RowGradients(embedding, 0, lambda: 0))
        gradients.begin()
        embedding(torch.tensor([5, 9, 5])).sum().backward()
        gradients.collect()
        assert sorted(outbox.read(table.memory, table.spec, 0).keys) == [5, 9] and gradients.rows_squared == pytest.approx(10.0)
        gradients.withdraw_rows()
        assert not len(outbox.read(table.memory, table.spec, 0).keys) and gradients.rows_squared == 0.0
    finally:
        table.close()
