from __future__ import annotations

import re

import model_zoo as zoo
import pytest
import torch
from torch import nn

from shoal.axes import tensor
from shoal.errors import PlanError
from shoal.job import Job
from shoal.plan import Plan
from shoal.train.describe import describe
from shoal.train.host import build
from shoal.train.part import cut_model, to_meta
from shoal.train.split import Split


def cut(job: Job, plan: str) -> Split | None:
    built = build(job)
    return cut_model(built, describe(built.model, built.optimizer), Plan.parse(plan))


def normalised() -> nn.Module:
    return nn.Sequential(nn.LayerNorm(37), nn.Linear(37, 10), nn.LayerNorm(10)).double()


class Functions(nn.Module):
    """Its layers are no modules."""

    def __init__(self) -> None:
        super().__init__()
        sizes = (37, 30, 20, 10)
        self.weights = nn.ParameterList(
            torch.randn(b, a, dtype=torch.float64) for a, b in zip(sizes, sizes[1:], strict=False)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for weight in self.weights:
            x = torch.tanh(nn.functional.linear(x, weight))
        return x


@pytest.mark.parametrize(
    ("job", "plan", "says", "remedy"),
    [
        (zoo.job("gpt", model=lambda: zoo.Gpt(heads=8).double()), "tp=3", "works on 8 heads", "tp=2, tp=4 or tp=8 would"),
        (zoo.job("gpt"), "tp=3", "works on 4 heads", "tp=2 or tp=4 would fit"),
        (zoo.job("gpt"), "pp=9,microbatches=2", "pp=9 needs 9 stages", "such as pp="),
        (zoo.job("odd"), "pp=2,microbatches=2,schedule=zbv", "pp=2,schedule=zbv needs 4 stages", "such as pp=3,schedule=1f1b"),
        (zoo.job("odd", model=Functions), "dp=2,pp=2,microbatches=2,zero=3", "cut between two functions", "use zero=2 with pp"),
        (zoo.job("odd", model=normalised), "tp=2", "tp=2 splits nothing in this model", "no linear"),
        (zoo.job("odd", optimizer=torch.optim.Adafactor), "tp=2", "Adafactor needs whole tensors", "use dp and pp only"),
    ],
)  # fmt: skip
def test_a_plan_that_does_not_fit_is_refused_in_one_sentence(job: Job, plan: str, says: str, remedy: str) -> None:
    with pytest.raises(PlanError) as refused:
        cut(job, plan)
    sentence = str(refused.value)
    assert says in sentence and remedy in sentence
    assert refused.value.exit_code == 2
    assert re.fullmatch(r"[^\n]+\.", sentence)


def test_what_is_split_is_explained_with_layers_of_one_kind_named_together() -> None:
    found = cut(zoo.job("gpt"), "tp=2,pp=2,microbatches=2")
    assert found is not None
    tensor, left, *stages = found.explanation
    assert tensor == (
        "tp=2 splits 18 layers: words by vocabulary; blocks.*.qkv, blocks.*.mlp.0, head by outputs; "
        "blocks.*.out, blocks.*.mlp.2 by inputs."
    )
    assert left.startswith("Not split: places (")
    assert "blocks.*.norm1, blocks.*.norm2, norm (" in left
    assert any("words.weight" in sentence for sentence in stages)


def test_a_plan_with_the_data_axis_alone_cuts_nothing() -> None:
    assert cut(zoo.job("odd"), "dp=2,zero=2") is None


def test_weights_that_went_to_the_meta_device_come_back_with_their_ties() -> None:
    model = zoo.Gpt()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    to_meta(model)
    assert all(p.is_meta for p in model.parameters()) and model.head.weight is model.words.weight
    tensor.materialise(model, state.__getitem__)
    assert model.head.weight is model.words.weight
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
