"""A step of SGD in one pass gives every bit that torch's gives, and can be undone wherever it was cut off."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from small_store import Ranks, every_bit

from shoal.axes.data import ArenaData
from shoal.axes.updating import Hooks, Totals
from shoal.axes.waiting import Waiting
from shoal.comm import dense
from shoal.comm.arena import Note
from shoal.comm.dense import SgdStep
from shoal.train.sgd import PARTLY, SgdChunk, is_plain

STEPS = 3
_HOOKS = Hooks(reach=lambda phase, step: None, before_chunk=lambda chunk, step: None)

pytestmark = pytest.mark.skipif(not dense.load().steps, reason="no compiler, or no fused multiply-add here")


class Killed(Exception):
    pass


def make(model: Any) -> torch.optim.Optimizer:
    """Two groups, so that pieces of one chunk have learning rates of their own."""
    return torch.optim.SGD(
        [{"params": [model.large, model.late]}, {"params": model.small.parameters(), "lr": 0.03}], lr=0.1
    )


class Cut:
    """Native code that dies after so many elements of one step."""

    def __init__(self, whole: dense.Dense, step: int, elements: int) -> None:
        self._whole, self._left, self._elements = whole, step, elements

    def __getattr__(self, name: str) -> Any:
        return getattr(self._whole, name)

    def sgd(self, weights: torch.Tensor, sources: Any, step: SgdStep) -> None:
        self._left -= 1
        if self._left:
            self._whole.sgd(weights, sources, step)
            return
        self._whole.sgd(weights, sources, dataclasses.replace(step, spans=np.minimum(step.spans, self._elements)))
        raise Killed


def _train(scale: float = 1.0, cut: tuple[int, int] | None = None) -> tuple[bytes, set[float]]:
    """Two ranks; ``cut``: in which step over a chunk of rank 0's, and after how many elements, it dies."""
    ranks = Ranks(make, 2)
    said: set[float] = set()
    axes = [ArenaData(ranks.store, rank, ranks.updater(rank), Waiting(spin_s=0.0)) for rank in range(2)]
    if cut is not None:
        dying = Cut(dense.load(), *cut)
        for chunk in axes[0].updater.chunks:  # type: ignore[attr-defined]
            chunk._sgd._dense = dying
    try:
        for step in range(STEPS):
            ranks.give_gradients(step)
            for axis in axes:
                axis.publish(step)
            for rank, axis in enumerate(axes):
                totals = Totals(1.0, 0.5 * scale)
                try:
                    axis.update(step, totals, None, _HOOKS)
                except Killed:
                    assert cut is not None and axis.slot.note(Note.UNDO_BYTES) >= 8 * cut[1]
                    axis = axes[rank] = ArenaData(ranks.store, rank, ranks.updater(rank), Waiting(spin_s=0.0))
                    axis.update(step, totals, None, _HOOKS)
                    cut = None
                said.add(axis.slot.note(Note.UNDO_LINES))
                axis.commit(step)
        assert cut is None
        return every_bit(ranks.store), said
    finally:
        ranks.close()


@pytest.mark.parametrize("scale", [1.0, 0.37])
def test_it_gives_the_bits_of_torchs_own_step(scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    bits, said = _train(scale)
    assert PARTLY in said
    monkeypatch.setattr(SgdChunk, "fits", lambda self, optimizer: False)
    theirs, said = _train(scale)
    assert PARTLY not in said and bits == theirs


def test_wherever_it_is_cut_off_the_update_is_made_as_if_it_had_not_been() -> None:
    undisturbed, _ = _train()
    for elements in (0, 1, 1500, 40_000):
        assert _train(cut=(2, elements))[0] == undisturbed, elements


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("way", [{}, {"fused": True}, {"foreach": True}, {"foreach": False}])
def test_sums_are_scaled_and_rounded_as_one_after_the_other(dtype: torch.dtype, way: dict[str, bool]) -> None:
    """Three sources, a factor and a scale, pieces with gaps between them, and numbers at which rounding might differ."""
    generator = torch.Generator().manual_seed(1)
    weights, *sources = (torch.randn(20_000, dtype=dtype, generator=generator) for _ in range(4))
    sources[0][:6] = torch.tensor([0.0, -0.0, 1e-45, float("inf"), 3e38, -3e38], dtype=dtype)
    weights[0] = -0.0
    pieces = [(0, 5), (64, 9_001), (9_024, 20_000)]
    learning_rates = [0.1, 0.003, 1.7]
    expected = weights.clone()
    parameters = [torch.nn.Parameter(expected[a:b]) for a, b in pieces]
    total = (sources[0] + sources[1] + sources[2]) * 0.3 * 0.77
    groups = [{"params": [p], "lr": lr} for p, lr in zip(parameters, learning_rates, strict=True)]
    for parameter, (a, b) in zip(parameters, pieces, strict=True):
        parameter.grad = total[a:b]
    torch.optim.SGD(groups, **way).step()  # type: ignore[arg-type]
    before, undo, saved = weights.clone(), torch.zeros_like(weights), torch.zeros(1, dtype=torch.float64)
    step = SgdStep(
        spans=np.array(pieces), rates=dense.rates(learning_rates, dtype), factor=0.3, scale=0.77,
        undo=undo.view(torch.uint8), saved=saved.data_ptr(),
    )  # fmt: skip
    dense.load().sgd(weights, sources, step)
    assert torch.equal(weights.view(torch.uint8), expected.view(torch.uint8))
    assert torch.equal(undo.view(torch.uint8), before.view(torch.uint8)) and saved.item() == weights.nbytes


@pytest.mark.parametrize(
    "more", [{"momentum": 0.9}, {"weight_decay": 0.1}, {"maximize": True}, {"lr": torch.tensor(0.1)}, {"differentiable": True}]
)
def test_sgd_with_more_than_a_rate_is_left_to_torch(more: dict[str, Any]) -> None:
    assert is_plain(torch.optim.SGD([torch.ones(1)], lr=0.1).param_groups[0])
    assert not is_plain(torch.optim.SGD([torch.ones(1)], **{"lr": 0.1, **more}).param_groups[0])
