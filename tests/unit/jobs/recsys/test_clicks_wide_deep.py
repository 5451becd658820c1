"""The recommender: its arithmetic, its AUC, dense and sparse gradients alike, and that it learns in a plain loop."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shoal.jobs import find
from shoal.jobs.recsys.clicks import clicks
from shoal.jobs.recsys.clicks_wide_deep import ClickAUC, WideDeep


def test_fields_have_rows_of_their_own() -> None:
    torch.manual_seed(0)
    model = WideDeep((3, 4), width=2, hidden=(5,))
    nn.init.normal_(model.wide.weight)
    ids = torch.tensor([[2, 0], [0, 3]])
    wide = model.wide.weight[[2, 0]] + model.wide.weight[[3 + 0, 3 + 3]]
    deep = torch.cat([model.deep.weight[[2, 0]], model.deep.weight[[3, 6]]], dim=1)
    assert torch.allclose(model(ids), (wide + model.perceptron(deep)).squeeze(1))


def test_auc_takes_logits_and_float_targets_in_any_batches() -> None:
    metric = ClickAUC()
    metric.update(torch.tensor([0.1, 0.9]), torch.tensor([0.0, 1.0]))  # could be taken for probabilities
    metric.update(torch.tensor([-3.0, 2.0, 0.5]), torch.tensor([0.0, 1.0, 0.0]))
    # Pairs of (clicked, not): 0.9 and 2.0 are each above 0.1, −3.0 and 0.5.
    assert metric.compute().item() == 1.0
    metric.update(torch.tensor([-4.0]), torch.tensor([1.0]))
    assert metric.compute().item() == pytest.approx(6 / 9)


def train(model: nn.Module, steps: int) -> list[float]:
    job = find("clicks-wide-deep").job
    made = clicks(steps * 512, seed=1)
    ids, clicked = torch.from_numpy(made.ids), torch.from_numpy(made.clicked)
    optimizer = job.optimizer(model.parameters())
    losses = []
    for step in range(steps):
        rows = slice(512 * step, 512 * (step + 1))
        optimizer.zero_grad()
        loss = job.loss(model(ids[rows]), clicked[rows])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def test_learns() -> None:
    job = find("clicks-wide-deep").job
    torch.manual_seed(0)
    model = job.model()
    losses = train(model, steps=60)
    unseen = clicks(5000, seed=2)
    metric = job.metrics["auc"]
    metric.update(model(torch.from_numpy(unseen.ids)), torch.from_numpy(unseen.clicked))
    assert sum(losses[-10:]) < 0.95 * sum(losses[:10])
    assert metric.compute() > 0.6


@pytest.mark.filterwarnings("ignore:Sparse invariant checks:UserWarning")  # torch's own Adagrad
def test_sparse_gradients_give_the_same_weights() -> None:
    torch.manual_seed(0)
    dense = find("clicks-wide-deep").job.model()
    sparse = find("shoal.jobs.recsys.clicks_wide_deep:sparse_job").job.model()
    sparse.load_state_dict(dense.state_dict())
    train(dense, steps=3)
    train(sparse, steps=3)
    assert sparse.deep.weight.grad is not None and sparse.deep.weight.grad.is_sparse
    for name, weight in dense.state_dict().items():
        assert torch.allclose(weight, sparse.state_dict()[name], atol=1e-6), name
