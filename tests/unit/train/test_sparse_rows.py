"""Gradients of which few rows are there, written to a place that holds those of the step before."""

from __future__ import annotations

import torch

from shoal.train.gradients import _SparseRows


def test_only_what_was_written_is_cleared_and_nothing_else_is_left() -> None:
    place = torch.full((50, 3), 7.0)
    rows = _SparseRows(place)
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
