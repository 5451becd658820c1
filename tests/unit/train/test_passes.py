from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import shoal
from shoal.comm.arena import Arena, Note, Phase, Slot
from shoal.comm.grid import Grid
from shoal.comm.store import arena_layout
from shoal.errors import UserCodeError
from shoal.train.batchnorm import without_statistics
from shoal.train.describe import describe
from shoal.train.faults import Faults
from shoal.train.feed import SPARE, Share
from shoal.train.passes import Surroundings, WholeModel


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 2)).double()


class Noted:
    """Stands for the sharded axis: notes what is asked of it."""

    def __init__(self) -> None:
        self.unnoticed_passes = self.abandoned = 0

    @contextlib.contextmanager
    def unnoticed(self) -> Iterator[None]:
        self.unnoticed_passes += 1
        yield

    def abandon(self) -> None:
        self.abandoned += 1


@pytest.fixture
def slot() -> Iterator[Slot]:
    model = network()
    arena = Arena.create(arena_layout(describe(model, torch.optim.SGD(model.parameters(), lr=0.1)), Grid()))
    yield arena.slots[0]
    arena.memory.close()


def around(slot: Slot, **changes: Any) -> Surroundings:
    job = shoal.Job(model=network, train_data=lambda: batch(4), loss=F.cross_entropy, metrics={"any": F.cross_entropy})
    return Surroundings(job=job.replace(**changes), rank=0, replica=0, slot=slot, faults=Faults(0, slot))


def batch(rows: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(rows, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x, (x[:, 0] > 0).long()


def share(rows: int) -> Share:
    return Share(np.arange(rows), (rows, 4))


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


def test_a_share_is_weighted_by_its_part_of_the_whole_batch(slot: Slot) -> None:
    model = network().eval()
    (outcome, count), = WholeModel(model, around(slot)).train(0, [(share(4), batch(4))], total=10)
    assert count == 4 and outcome.weight == 4
    x, y = batch(4)
    twin = network().eval()
    (F.cross_entropy(twin(x), y) * 4 / 10).backward()
    for found, expected in zip(gradients(model), gradients(twin), strict=True):
        torch.testing.assert_close(found, expected)
    assert slot.note(Note.PHASE) == Phase.BACKWARD


def test_random_numbers_depend_on_the_step_and_the_microbatch_and_on_nothing_else(slot: Slot) -> None:
    def losses(step: int) -> list[float]:
        passes = WholeModel(network(), around(slot))
        return [o.loss.item() for o, _ in passes.train(step, [(share(4), batch(4)), (share(4), batch(4))], 8)]

    assert losses(3) == losses(3) != losses(4)
    assert losses(3)[0] != losses(3)[1]


def test_an_empty_share_is_skipped(slot: Slot) -> None:
    model = network()
    assert list(WholeModel(model, around(slot)).train(0, [(share(0), None)], 4)) == []
    assert gradients(model) == []


def test_with_sharded_weights_an_empty_share_goes_through_the_model_and_leaves_no_trace(slot: Slot) -> None:
    model, sharded = network(), Noted()
    before = {name: b.clone() for name, b in model.named_buffers()}
    passes = WholeModel(model, around(slot), sharded, lambda: batch(SPARE))
    assert list(passes.train(0, [(share(0), None)], 4)) == []
    assert sharded.unnoticed_passes == 1
    assert len(gradients(model)) == 6 and not any(g.any() for g in gradients(model))
    assert all(torch.equal(b, before[name]) for name, b in model.named_buffers())
    assert all(m.training for m in model.modules())
    passes.clear()
    assert sharded.abandoned == 1


def test_batchnorm_without_statistics_takes_a_single_sample() -> None:
    model = network()
    with pytest.raises(ValueError, match="more than 1 value"):
        model(batch(1)[0])
    counted = int(model[1].num_batches_tracked)
    with without_statistics(model):
        model(batch(1)[0])
    assert model[1].training and int(model[1].num_batches_tracked) == counted


def test_a_loss_that_nothing_can_learn_from_is_refused(slot: Slot) -> None:
    passes = WholeModel(network(), around(slot, loss=lambda output, target: output.detach().mean()))
    with pytest.raises(Exception, match="does not depend on any parameter") as raised:
        list(passes.train(0, [(share(4), batch(4))], 4))
    assert not isinstance(raised.value, UserCodeError) and "\n" not in str(raised.value)


def test_evaluation_keeps_the_output_only_where_there_are_metrics(slot: Slot) -> None:
    model = network().eval()
    with torch.no_grad():
        with_metrics = WholeModel(model, around(slot)).evaluate(batch(4), 4)
        without = WholeModel(model, around(slot, metrics={})).evaluate(batch(4), 4)
    assert with_metrics is not None and with_metrics.output.shape == (4, 2)
    assert without is not None and without.output is None
