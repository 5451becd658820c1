from __future__ import annotations

from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from shoal.errors import JobError
from shoal.job import Job
from shoal.train import objective


def job(**fields: Any) -> Job:
    return Job(model=nn.Linear(2, 1), train_data=(torch.zeros(1, 2), torch.zeros(1, 1)), **fields)


class Pair(NamedTuple):
    x: torch.Tensor
    y: torch.Tensor


X, Y = torch.tensor([[1.0, 2.0], [3.0, 5.0]]), torch.tensor([[1.0], [0.0]])


@pytest.mark.parametrize("batch", [(X, Y), [X, Y], Pair(X, Y)])
def test_a_pair_is_input_and_target(batch: Any) -> None:
    model = nn.Linear(2, 1)
    outcome = objective.compute(job(loss=F.mse_loss), model, batch, 2)
    assert outcome.loss.item() == pytest.approx(F.mse_loss(model(X), Y).item())
    assert (outcome.weight, outcome.measured, outcome.is_sum) == (2.0, False, False)
    assert torch.equal(outcome.target, Y)


def test_what_the_model_is_called_with() -> None:
    class Model(nn.Module):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return args, kwargs

    model = Model()
    assert objective.call(model, {"a": 1, "b": {"c": 2}}) == ((), {"a": 1, "b": {"c": 2}})
    assert objective.call(model, (1, 2)) == ((1, 2), {})
    assert objective.call(model, 3) == ((3,), {})
    assert objective.split((1, 2, 3)) == ((1, 2), 3)
    assert objective.split({"x": 1}) == ({"x": 1}, {"x": 1})


def test_a_share_of_a_mean_is_its_part_of_the_global_batch() -> None:
    outcome = objective.Outcome(torch.tensor(3.0), 2.0, is_sum=False, measured=False)
    assert outcome.to_backward(8).item() == 3.0 * 2 / 8
    assert outcome.to_backward(2).item() == 3.0
    assert outcome.loss_sum() == 6.0


def test_sums_and_measured_means_are_divided_later() -> None:
    model = nn.Linear(2, 1)
    summed = objective.compute(job(loss=lambda o, t: (o.sum(), torch.tensor(5))), model, (X, Y), 2)
    assert summed.to_backward(9).item() == summed.loss_sum() == pytest.approx(model(X).sum().item())
    assert summed.weight == 5.0
    weighted = objective.compute(job(loss=lambda o, t: o.mean(), weight=lambda batch: 7), model, (X, Y), 2)
    assert weighted.loss_sum() == pytest.approx(7 * model(X).mean().item())
    assert weighted.to_backward(9).item() == pytest.approx(weighted.loss_sum())


@pytest.mark.parametrize("as_mapping", [True, False])
def test_a_mean_over_no_labels_adds_nothing_to_loss_or_gradient(as_mapping: bool) -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Linear(2, 3)

        def forward(self, x: torch.Tensor, labels: torch.Tensor) -> Any:
            logits = self.net(x)
            found = {"loss": F.cross_entropy(logits, labels), "logits": logits}
            return found if as_mapping else SimpleNamespace(**found)

    model = Model()
    outcome = objective.compute(job(), model, {"x": X, "labels": torch.tensor([-100, -100])}, 2)
    assert outcome.loss.isnan() and outcome.weight == outcome.loss_sum() == 0.0
    outcome.to_backward(2).backward()
    assert model.net.weight.grad is not None and not model.net.weight.grad.any()


def test_labels_of_a_causal_language_model_are_shifted() -> None:
    class TinyForCausalLM(nn.Module):
        pass

    labels = torch.tensor([[1, 2, -100], [3, -100, 4]])
    assert objective.count_labels(nn.Linear(1, 1), {"labels": labels}) == 4
    assert objective.count_labels(TinyForCausalLM(), {"labels": labels}) == 2
    assert objective.count_labels(nn.Linear(1, 1), {"labels": labels.float()}) is None
    assert objective.count_labels(nn.Linear(1, 1), (labels,)) is None


def test_a_step_may_return_more_than_its_loss() -> None:
    def step(model: nn.Module, batch: Any) -> dict[str, Any]:
        return {"loss": model(batch[0]).mean(), "size": 3, "largest": batch[0].max()}

    outcome = objective.compute(job(step=step), nn.Linear(2, 1), (X, Y), 2)
    assert outcome.values == {"size": 3.0, "largest": 5.0}
    assert outcome.output is None


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"loss": lambda o, t: o}, "has the shape"),
        ({"loss": lambda o, t: 3.0}, "a float"),
        ({"loss": lambda o, t: (o.sum(), 1, 2)}, "returned 3 values"),
        ({"loss": lambda o, t: (o.sum(), torch.ones(2))}, "weight has the shape"),
        ({"step": lambda m, b: {"cost": 1}}, 'without "loss"'),
        ({"step": lambda m, b: {"loss": m(b[0]).mean(), "v": torch.ones(2)}}, "v has the shape"),
    ],
)
def test_a_loss_that_is_none_is_refused_in_one_sentence(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(JobError, match=words):
        objective.compute(job(**fields), nn.Linear(2, 1), (X, Y), 2)


def test_a_model_without_a_loss_of_its_own() -> None:
    class Model(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return SimpleNamespace(loss=None)

    with pytest.raises(JobError, match="the model returned none"):
        objective.compute(job(), Model(), {"x": X}, 2)
