"""Steps over single lines in C: which optimizers they stand in for, and with what bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from shoal.comm import native
from shoal.train import line_step
from shoal.train.line_step import find

needs_c = pytest.mark.skipif(native.load().name != "c", reason="no C compiler")


def _optimizer(make: Any, **options: Any) -> torch.optim.Optimizer:
    optimizer: torch.optim.Optimizer = make([torch.nn.Parameter(torch.ones(16))], **options)
    return optimizer


@needs_c
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_those_that_workers_use_are_found(dtype: torch.dtype) -> None:
    assert find(_optimizer(torch.optim.SGD, lr=0.1, fused=True), dtype, ()) is not None
    assert find(_optimizer(torch.optim.Adagrad, lr=0.1, fused=True), dtype, ("sum",)) is not None


@pytest.mark.parametrize(
    ("optimizer", "dtype", "keys"),
    [
        (_optimizer(torch.optim.Adagrad, lr=torch.tensor(0.1), fused=False), torch.float32, ("sum",)),
        (_optimizer(torch.optim.SGD, lr=0.1), torch.bfloat16, ()),
        (_optimizer(torch.optim.SGD, lr=0.1), torch.float32, ("momentum_buffer",)),
        (_optimizer(torch.optim.Adam), torch.float32, ("exp_avg", "exp_avg_sq")),
    ],
)
def test_others_go_by_torch(optimizer: Any, dtype: torch.dtype, keys: tuple[str, ...]) -> None:
    assert find(optimizer, dtype, keys) is None


@needs_c
def test_a_kernel_with_other_bits_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(line_step, "_has_torchs_bits", lambda *rest: False)
    assert line_step._find.__wrapped__(torch.optim.SGD, torch.float32, True, None) is None


@needs_c
@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_lines_are_updated_where_they_lie(decay: float) -> None:
    """Three groups with rates of their own, some lines of each, scaled as by clipping; the rest keeps every bit."""
    made = torch.Generator().manual_seed(1)
    groups = [{"lr": rate, "lr_decay": decay, "eps": 1e-10} for rate in (0.1, 0.02)]
    weights, sums = (torch.rand(40 * 16, generator=made) for _ in range(2))
    lines = torch.tensor([3, 4, 17, 39])
    gradient = torch.randn(4 * 16, generator=made)
    at = (lines[:, None] * 16 + torch.arange(16)).view(-1)
    parts = [torch.nn.Parameter(weights[at][:32]), torch.nn.Parameter(weights[at][32:])]
    truth = torch.optim.Adagrad([{"params": [p], **g} for p, g in zip(parts, groups, strict=True)], fused=True)
    for k, part in enumerate(parts):
        truth.state[part]["sum"].copy_(sums[at][32 * k : 32 * k + 32])
        truth.state[part]["step"].fill_(6.0)
        part.grad = gradient[32 * k : 32 * k + 32] * 0.25
    truth.step()
    expected = [weights.clone(), sums.clone()]
    expected[0][at] = torch.cat([p.detach() for p in parts])
    expected[1][at] = torch.cat([truth.state[p]["sum"] for p in parts])
    step = find(truth, torch.float32, ("sum",))
    assert step is not None
    held = [weights.view(torch.uint8), sums.view(torch.uint8)]
    for k, group in enumerate(groups):
        step.run(held, gradient[32 * k :], lines[2 * k : 2 * k + 2], group, 7.0, 0.25)
    assert torch.equal(weights.view(torch.int32), expected[0].view(torch.int32))
    assert torch.equal(sums.view(torch.int32), expected[1].view(torch.int32))
