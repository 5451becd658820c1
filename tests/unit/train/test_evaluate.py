from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchmetrics import Metric
from torchmetrics.classification import BinaryAUROC, MulticlassAccuracy, MulticlassF1Score

from shoal.data.source import open_source
from shoal.errors import JobFailed
from shoal.job import Job
from shoal.train.evaluate import Slice, Tally, combine, evaluate, flatten


def job(**fields: Any) -> Job:
    torch.manual_seed(1)
    x = torch.randn(47, 4)
    y = (x.sum(1) > 0).long()
    return Job(model=nn.Linear(4, 2), train_data=(x, y), loss=F.cross_entropy, batch_size=10, **fields)


@pytest.mark.parametrize("workers", [1, 2, 3, 6])
def test_the_parts_of_any_number_of_workers_make_the_whole(workers: int) -> None:
    """Six workers are more than there are batches, so one of them has nothing to say."""

    class Auroc(BinaryAUROC):
        def update(self, preds: torch.Tensor, target: torch.Tensor) -> None:
            super().update(preds.softmax(1)[:, 1], target)

    metrics = {
        "accuracy": lambda o, t: (o.argmax(1) == t).float().mean(),
        "auc": Auroc(),
        "f1": MulticlassF1Score(2, average=None),
        "hits": MulticlassAccuracy(2, average="micro"),
    }
    wanted = job(metrics=metrics)
    model = wanted.model.train()
    before = copy.deepcopy(metrics["auc"])
    source = open_source(wanted.train_data, "data")
    parts = [evaluate(wanted, model, source, Slice(rank, workers)) for rank in range(workers)]
    found = combine(parts, "eval_")
    x, y = wanted.train_data
    with torch.no_grad():
        output = model(x)
    f1 = MulticlassF1Score(2, average=None)(output, y)
    accuracy = (output.argmax(1) == y).float().mean().item()
    assert found == pytest.approx(
        {
            "eval_loss": F.cross_entropy(output, y).item(), "eval_accuracy": accuracy, "eval_hits": accuracy,
            "eval_auc": BinaryAUROC()(output.softmax(1)[:, 1], y).item(),
            "eval_f1_0": f1[0].item(), "eval_f1_1": f1[1].item(),
        },
        rel=1e-5,
    )  # fmt: skip
    assert model.training
    # The job's own metric object is not the one that was updated.
    assert metrics["auc"].update_called == before.update_called is False  # type: ignore[attr-defined]


def test_a_metric_whose_states_do_not_fit_together_is_named_with_its_worker() -> None:
    class Counts(Metric):
        """Counts as many classes as it has met: another number in each worker."""

        full_state_update = False

        def __init__(self) -> None:
            super().__init__()
            self.add_state("counts", torch.zeros(1), dist_reduce_fx="sum")

        def update(self, target: torch.Tensor) -> None:
            self.counts = torch.bincount(target, minlength=len(self.counts)).double()

        def compute(self) -> torch.Tensor:
            return self.counts.sum()

    parts = []
    for classes in ([0, 1, 2], [0, 0, 1, 2], [0]):
        metric = Counts()
        metric.update(torch.tensor(classes))
        parts.append(Tally(metrics={"seen": metric}))
    assert combine(copy.deepcopy(parts[:2])) == {"seen": 7.0}
    # It could be stretched to the others' shape, and would count three times.
    with pytest.raises(JobFailed, match=r'worker 2 has of the metric "eval_seen" .* counts is of shape \(1,\), not \(3,\)'):
        combine(parts, "eval_")


def test_the_model_is_evaluated_in_evaluation_mode_and_without_gradients() -> None:
    seen: list[tuple[bool, bool]] = []

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        seen.append((torch.is_grad_enabled(), output.requires_grad))
        return F.cross_entropy(output, target)

    wanted = job().replace(loss=loss, model=nn.Sequential(nn.Linear(4, 2), nn.Dropout(0.9)))
    source = open_source(wanted.train_data, "data")
    first, second = (combine([evaluate(wanted, wanted.model, source, Slice())]) for _ in range(2))
    assert first == second
    assert set(seen) == {(False, False)}


def test_weights_count_in_sums() -> None:
    parts = [Tally({"loss": (6.0, 2.0)}), Tally({"loss": (1.0, 3.0)}), Tally({"loss": (0.0, 0.0), "odd": (0.0, 0.0)})]
    found = combine(parts)
    assert found["loss"] == 7 / 5
    assert math.isnan(found["odd"])


def test_results_that_are_no_single_number_get_names() -> None:
    value = {"a": torch.tensor(1.0), "b": torch.tensor([2.0, 3.0])}
    assert flatten("m", value) == {"m_a": 1.0, "m_b_0": 2.0, "m_b_1": 3.0}
