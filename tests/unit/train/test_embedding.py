"""Our kernel for the gradients of embedding tables has torch's bits."""

from __future__ import annotations

from collections.abc import Iterator

import psutil
import pytest
import torch

from shoal.train.embedding import Embeddings, quicken_embeddings


def gradients(dtype: torch.dtype, index_dtype: torch.dtype, **options: object) -> list[torch.Tensor]:
    """Gradients of a small table whose rows come up many times each, with a large range of magnitudes."""
    made = torch.Generator().manual_seed(3)
    table = torch.randn(50, 7, generator=made, dtype=torch.float64).to(dtype).requires_grad_()
    rows = torch.randint(0, 50, (300, 4), generator=made).to(index_dtype).t()
    weight = torch.randn(4, 300, 7, generator=made, dtype=torch.float64)
    weight = (weight * 10 ** weight).to(dtype)
    out = torch.nn.functional.embedding(rows, table, **options)  # type: ignore[arg-type]
    (first,) = torch.autograd.grad((out**2 * weight).sum(), table, create_graph=True)
    (second,) = torch.autograd.grad(first.sin().sum(), table)
    (spread,) = torch.autograd.grad(torch.nn.functional.embedding(rows, table, **options).sum(), table)  # type: ignore[arg-type]
    return [first.detach(), second, spread]


CASES = [
    (torch.float32, torch.int64, {}),
    (torch.float64, torch.int64, {"padding_idx": 3}),
    (torch.float32, torch.int32, {}),
    (torch.bfloat16, torch.int64, {}),
    (torch.float32, torch.int64, {"scale_grad_by_freq": True}),
]


@pytest.fixture
def plain() -> Iterator[list[list[torch.Tensor]]]:
    yield [gradients(dtype, index, **options) for dtype, index, options in CASES]


@pytest.mark.filterwarnings("error")
def test_bits_are_those_of_torch(plain: list[list[torch.Tensor]]) -> None:
    held = quicken_embeddings()
    if held is None:
        pytest.skip("no compiler, or a torch without get_kernel")
    try:
        for (dtype, index, options), expected in zip(CASES, plain, strict=True):
            for ours, theirs in zip(gradients(dtype, index, **options), expected, strict=True):
                assert torch.equal(ours, theirs)
    finally:
        held.end()
    for ours, theirs in zip(gradients(torch.float32, torch.int64), plain[0], strict=True):
        assert torch.equal(ours, theirs)


def test_rows_that_the_batch_does_not_reach_take_no_memory() -> None:
    held = quicken_embeddings()
    if held is None:
        pytest.skip("no compiler, or a torch without get_kernel")
    try:
        table = torch.empty(1 << 16, 256).requires_grad_()
        rows = torch.tensor([5, 1 << 15, 5])
        found = torch.nn.functional.embedding(rows, table)
        before = psutil.Process().memory_info().rss
        (gradient,) = torch.autograd.grad(found.sum(), table)
        assert psutil.Process().memory_info().rss - before < gradient.nbytes / 4
    finally:
        held.end()
    assert torch.equal(gradient.sum(1).nonzero()[:, 0], torch.tensor([5, 1 << 15]))
    assert gradient[5].tolist() == [2.0] * 256


@pytest.fixture
def embeddings() -> Iterator[Embeddings]:
    held = quicken_embeddings()
    if held is None:
        pytest.skip("no compiler, or a torch without get_kernel")
    yield held
    held.end()


def _backward(table: torch.nn.Parameter, rows: list[int], factor: float = 1.0) -> torch.Tensor:
    table.grad = None
    (torch.nn.functional.embedding(torch.tensor(rows), table).sum() * factor).backward()
    assert table.grad is not None
    return table.grad


def test_a_table_that_is_given_back_is_the_next_gradient(embeddings: Embeddings) -> None:
    table = torch.nn.Parameter(torch.rand(4000, 16))
    gradient = _backward(table, [5, 7, 5])
    rows = embeddings.rows(table, gradient)
    assert rows is not None and rows.tolist() == [5, 7, 5]
    place = gradient.data_ptr()
    embeddings.give_back(gradient)
    # While somebody has it, it is nobody else's.
    other = _backward(table, [9])
    assert other.data_ptr() != place and gradient[:, 0].nonzero().view(-1).tolist() == [5, 7]
    del gradient
    again = _backward(table, [3], 2.0)
    assert again.data_ptr() == place and again.sum() == 32 and again[3].tolist() == [2.0] * 16


def test_a_batch_may_be_written_where_the_last_one_was(embeddings: Embeddings) -> None:
    table, batch = torch.nn.Parameter(torch.rand(4000, 16)), torch.tensor([5, 7])
    for first in (5, 50, 500):
        table.grad = None
        batch.copy_(torch.tensor([first, first + 2]))
        torch.nn.functional.embedding(batch, table).sum().backward()
        assert table.grad is not None
        assert table.grad[:, 0].nonzero().view(-1).tolist() == [first, first + 2]
        assert embeddings.rows(table, table.grad) is not None
        embeddings.give_back(table.grad)


def test_what_others_may_have_changed_is_taken_as_a_whole(embeddings: Embeddings) -> None:
    table = torch.nn.Parameter(torch.rand(4000, 16))
    gradient = _backward(table, [5])
    gradient.add_(1.0)
    assert embeddings.rows(table, gradient) is None
    gradient = _backward(table, [5])
    assert embeddings.rows(table, gradient) is not None
    assert embeddings.rows(table, gradient.clone()) is None
    handle = table.register_hook(lambda g: None)
    assert embeddings.rows(table, _backward(table, [5])) is None
    handle.remove()
    tied = table[0].sum() + torch.nn.functional.embedding(torch.tensor([5]), table).sum()
    table.grad = None
    tied.backward()
    assert table.grad is not None and embeddings.rows(table, table.grad) is None
    assert table.grad[[0, 5]].eq(1.0).all() and table.grad.sum() == 32
