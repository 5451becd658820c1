"""The state of metrics, step by step: what a successor takes up is what its predecessor had at that step's beginning."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torchmetrics import MeanMetric, Metric
from torchmetrics.classification import BinaryAUROC, MulticlassAccuracy
from torchmetrics.wrappers import ClasswiseWrapper

from shoal.comm.arena import Arena, ArenaLayout
from shoal.comm.journal import Journal
from shoal.train import notes
from shoal.train.evaluate import flatten
from shoal.train.metric_state import MetricNotes, deal_pieces, read_pieces, write_pieces

LAYOUT = ArenaLayout.plan(3, {"something": 100})


class Window(Metric):
    """Its list does not only grow: the oldest entries go. Some entries are no tensors, and one is in bfloat16."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("last", [], dist_reduce_fx=None)
        self.add_state("words", [], dist_reduce_fx=None)
        self.mode: str | None = None

    def update(self, x: torch.Tensor) -> None:
        self.mode = "begun"
        self.last = [*self.last[-2:], x.to(torch.bfloat16)]
        self.words.append((f"{float(x.sum()):.4f}", len(self.words)))

    def compute(self) -> torch.Tensor:
        assert self.mode == "begun"
        return torch.cat([x.reshape(-1).double() for x in self.last]).sum() + len(self.words)


def fresh() -> dict[str, Any]:
    """A list that grows, a table, a table in another metric, a weighted mean, and a list that moves."""
    return {
        "auc": BinaryAUROC(), "each": ClasswiseWrapper(MulticlassAccuracy(2, average=None)), "mean": MeanMetric(),
        "window": Window(), "binned": BinaryAUROC(thresholds=5),
    }  # fmt: skip


def update(metrics: dict[str, Any], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    # Uneven, and nothing at all in some steps.
    x = torch.rand(7 * step % 5, generator=generator)
    if not len(x):
        return
    target = (x + 0.9 * torch.randn(len(x), generator=generator) > 0.5).int()
    for name in ("auc", "binned"):
        metrics[name].update(x[:], target)
    metrics["each"].update(torch.stack([1 - x, x], 1), target)
    metrics["mean"].update(x.mean(), len(x))
    metrics["window"].update(x)


def values(metrics: dict[str, Any]) -> dict[str, float]:
    found: dict[str, float] = {}
    for name, metric in metrics.items():
        if metric.update_called:
            found.update(flatten(name, copy.deepcopy(metric).compute()))
    return found


def after(steps: Iterable[int], *names: str) -> dict[str, float]:
    metrics = fresh()
    for step in steps:
        update(metrics, step)
    return values({name: metric for name, metric in metrics.items() if name in names or not names})


@pytest.fixture(params=["shared", "private"])
def arena(request: pytest.FixtureRequest) -> Iterator[Arena]:
    made = Arena.create(LAYOUT) if request.param == "shared" else Arena.private(LAYOUT)
    yield made
    made.memory.close()


def test_a_successor_goes_on_at_any_step(arena: Arena) -> None:
    """In each step the worker dies twice: before it has written, and after."""
    metrics, journal = fresh(), Journal(arena, 1)
    kept = MetricNotes(metrics, fresh(), journal)
    for step in range(1, 12):
        for written in (False, True):
            update(metrics, step)
            if written:
                kept.keep(step + 1)
            metrics = fresh()
            kept = MetricNotes(metrics, fresh(), Journal(arena, 1))
            kept.recall(step + written)
        assert values(metrics) == after(range(1, step + 1))
    # A checkpoint of the step before can still be written.
    assert read_pieces(journal, 11) and not read_pieces(journal, 10)


def test_what_is_left_out_is_in_nothing_that_is_kept_later(arena: Arena) -> None:
    metrics = fresh()
    kept, counted = MetricNotes(metrics, fresh(), Journal(arena, 0)), list[int]()
    for step in range(12):
        update(metrics, step)
        kept.keep(step + 1)
        if step in (0, 3, 4, 8, 11):
            kept.leave_out(step)
            # Once more, by a successor that finds what is kept and that it does not count.
            metrics = fresh()
            kept = MetricNotes(metrics, fresh(), Journal(arena, 0))
            kept.recall(step + 1)
            kept.leave_out(step)
        else:
            counted.append(step)
        successor = fresh()
        MetricNotes(successor, fresh(), Journal(arena, 0)).recall(step + 1)
        assert values(successor) == values(metrics) == after(counted)


def test_an_epoch_is_forgotten(arena: Arena) -> None:
    metrics = fresh()
    kept = MetricNotes(metrics, fresh(), Journal(arena, 0))
    for step in range(6):
        update(metrics, step)
        kept.keep(step + 1)
    kept.begin_again(6)
    assert read_pieces(Journal(arena, 0), 6) == []
    update(metrics, 6)
    kept.keep(7)
    again = fresh()
    MetricNotes(again, fresh(), Journal(arena, 0)).recall(7)
    assert values(again) == after(range(6, 7))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_from_a_checkpoint_to_another_number_of_workers(world_size: int, tmp_path: Path) -> None:
    """Two workers had done six steps between them; as many or others finish."""
    arena = Arena.create(LAYOUT)
    names = ("auc", "binned")
    for rank in (0, 1):
        metrics = {name: fresh()[name] for name in names}
        kept = MetricNotes(metrics, fresh(), Journal(arena, rank))
        for step in range(6):
            if step % 2 == rank:
                update({**fresh(), **metrics}, step)
            kept.keep(step + 1)
        (tmp_path / f"{rank}.pt").write_bytes(notes.to_bytes(read_pieces(Journal(arena, rank), 6)))
    saved = [notes.read(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    total: dict[str, Any] = {name: fresh()[name] for name in names}
    for rank, pieces in enumerate(deal_pieces(saved, world_size)):
        write_pieces(Journal(arena, rank), 6, pieces)
        metrics = {name: fresh()[name] for name in names}
        kept = MetricNotes(metrics, fresh(), Journal(arena, rank))
        kept.recall(6)
        if rank == 0:
            update({**fresh(), **metrics}, 6)
        kept.keep(7)
        # What this worker writes now is all that it has taken over.
        successor = {name: fresh()[name] for name in names}
        MetricNotes(successor, fresh(), Journal(arena, rank)).recall(7)
        for name in names:
            if successor[name].update_called:
                total[name].merge_state(successor[name])
                total[name]._update_count += 1
    assert values(total) == pytest.approx(after(range(7), *names))
    arena.memory.close()
