from __future__ import annotations

import pytest
import torch

import shoal
from shoal.errors import JobError
from shoal.ps.staleness import factor_of


def test_an_optimizer_says_how_much_a_late_push_counts() -> None:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
    assert factor_of(optimizer) is None
    assert shoal.ps.staleness_aware(optimizer) is optimizer
    factor = factor_of(optimizer)
    assert factor is not None and [factor(s) for s in (0, 1, 3)] == [1.0, 0.5, 0.25]
    assert factor_of(shoal.ps.staleness_aware(optimizer, lambda staleness: 0.9**staleness))(2) == pytest.approx(0.81)  # type: ignore[misc]
    for wrong in (0.5, lambda: 1.0):
        with pytest.raises(JobError, match="give a function of one argument"):
            shoal.ps.staleness_aware(optimizer, wrong)  # type: ignore[arg-type]
