"""Models are cut where they can be, into stages that compute the same, or refused in a sentence."""

from __future__ import annotations

import itertools
import pickle
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from shoal.axes.pipeline_balance import balance, measure
from shoal.axes.pipeline_cut import build_stage, default_compute, find_cut
from shoal.errors import JobError, PlanError


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4)
        self.mlp = nn.Sequential(nn.Linear(4, 8), nn.GELU(), nn.Linear(8, 4))

    def forward(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        return x + self.mlp(self.norm(x)) * scale


class Language(nn.Module):
    def __init__(self, blocks: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.words = nn.Embedding(9, 4)
        self.dropout, self.twice = nn.Dropout(dropout), nn.Identity()
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.head = nn.Linear(4, 9, bias=False)
        self.head.weight = self.words.weight

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        x = self.dropout(self.words(text))
        scale = (text > 0).unsqueeze(-1).to(x.dtype)
        for block in self.blocks:
            x = block(x, scale)
        return self.head(self.twice(self.twice(x)))


TEXT = torch.tensor([[1, 2, 3], [4, 5, 0]])


class Ones(dict[str, float]):
    def get(self, key: str, default: Any = None) -> float:
        return 1.0


@given(st.lists(st.integers(0, 20), min_size=1, max_size=9), st.integers(1, 9))
def test_balance_is_the_best_of_all_ways(costs: list[int], stages: int) -> None:
    if stages > len(costs):
        with pytest.raises(ValueError, match="parts"):
            balance(costs, stages)
        return

    def key(cuts: tuple[int, ...]) -> tuple[float, float]:
        ends = [0, *cuts, len(costs)]
        sums = [sum(costs[a:b]) for a, b in itertools.pairwise(ends)]
        return max(sums), sum(s * s for s in sums)

    best = min(map(key, itertools.combinations(range(1, len(costs)), stages - 1)))
    found = balance(costs, stages)
    assert len(found) == stages - 1 and list(found) == sorted(set(found))
    assert key(found)[0] == best[0]


@given(st.lists(st.integers(1, 20), min_size=4, max_size=12), st.sampled_from([(0, 1, 0, 1), (0, 1, 1, 0)]))
def test_where_a_rank_holds_several_stages_their_sum_counts(costs: list[int], holders: tuple[int, ...]) -> None:
    def most(cuts: tuple[int, ...]) -> int:
        ends = [0, *cuts, len(costs)]
        stages = [sum(costs[a:b]) for a, b in zip(ends, ends[1:], strict=False)]
        return max(sum(cost for cost, own in zip(stages, holders, strict=True) if own == rank) for rank in (0, 1))

    found = balance(costs, 4, holders)
    assert len(found) == 3 and list(found) == sorted(set(found)) and found[0] > 0 and found[-1] < len(costs)
    assert most(found) <= most(balance(costs, 4))
    assert balance(costs, 4, (0, 1, 2, 3)) == balance(costs, 4)


def test_a_head_as_dear_as_three_layers_leaves_both_ranks_of_an_interleaved_schedule_as_much_to_do() -> None:
    # One embedding, six layers, a head.
    assert balance([1.0] * 6 + [4.0], 4) == (2, 4, 6)
    cuts = balance([1.0] * 6 + [4.0], 4, (0, 1, 0, 1))
    assert cuts[0] + cuts[2] - cuts[1] == 5


def test_a_transformer_is_cut_between_blocks_and_tied_weights_are_in_two_stages() -> None:
    model = Language()
    cut = find_cut(model, 3, TEXT, costs={"": 1.0, "blocks.0": 5.0, "blocks.1": 1.0, "blocks.2": 1.0, "blocks.3": 6.0})
    assert [boundary.before for boundary in cut.boundaries] == ["blocks.1", "blocks.3"]
    assert cut.shared == {"words.weight": (0, 2)}
    assert cut.blocks == (("blocks.0",), ("blocks.1", "blocks.2"), ("blocks.3",))
    assert cut.costs_s == (6.0, 2.0, 6.0)
    assert "blocks.1, blocks.3" in cut.explanation[0] and "words.weight" in cut.explanation[1]
    assert pickle.loads(pickle.dumps(cut)) == cut


def test_a_stage_has_the_models_own_parameters_under_their_names_and_no_others() -> None:
    model = Language()
    cut = find_cut(model, 3, TEXT, costs=Ones())
    own = dict(model.named_parameters())
    for index in range(3):
        held = dict(build_stage(model, cut, index).module.named_parameters())
        assert tuple(held) == tuple(name for name in own if name in cut.parameters[index])
        assert all(held[name] is own[name] for name in held)
    assert set(itertools.chain(*cut.parameters)) == set(own)


def test_nothing_of_the_model_is_changed() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 4)).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    find_cut(model, 2, torch.randn(5, 4))
    torch.set_rng_state(random_state)
    assert not model.training and all(p.grad is None for p in model.parameters())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_stages_take_other_shapes_than_the_example_and_both_modes() -> None:
    model = Language()
    stages = [build_stage(model, cut, i) for cut in [find_cut(model, 2, TEXT, costs=Ones())] for i in range(2)]
    for training, text in itertools.product((True, False), (TEXT, TEXT[:1, :2], TEXT.repeat(3, 4))):
        model.train(training)
        received: Any = ()
        for stage in stages:
            stage.module.train(training)
            ran = stage.run(received, lambda module, text=text: module(text))
            received = ran.leaving
        assert torch.equal(ran.result, model(text))


def test_dropout_does_not_keep_a_model_from_being_cut() -> None:
    cut = find_cut(Language(dropout=0.5), 2, TEXT, costs=Ones())
    assert cut.stages == 2


def test_parts_of_a_sequential_without_parameters_make_no_stage() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Tanh(), nn.Linear(4, 4), nn.ReLU())
    assert [b.before for b in find_cut(model, 2, torch.randn(3, 4)).boundaries] == ["3"]
    with pytest.raises(PlanError, match=r"pp=3 needs 3 stages .* at most 2 \(before 3\); use at most 2"):
        find_cut(model, 3, torch.randn(3, 4))


@pytest.mark.parametrize(
    ("stages", "asked", "points", "words"),
    [
        (9, "pp=9", None, r"^pp=9 needs 9 stages .* at most 6 \(before blocks.0, .*, head\); use at most 6 stages"),
        (8, "pp=4,interleave=2", None, "^pp=4,interleave=2 needs 8 stages"),
        (3, "pp=3", ["blocks.1"], "needs 2 split_points, not 1"),
        (2, "pp=2", ["block.1"], 'no module "block.1".*Did you mean "blocks.1"'),
        (3, "pp=3", ["blocks.2", "blocks.1"], 'not in the order of computing: "blocks.1" comes before "blocks.2"'),
        (2, "pp=2", ["words"], 'nothing to cut off before "words"'),
        (2, "pp=2", ["twice"], 'cannot be cut before "twice"'),
        (2, "pp=2", "blocks.1", "no list"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(stages: int, asked: str, points: Any, words: str) -> None:
    with pytest.raises(PlanError, match=words) as caught:
        find_cut(Language(), stages, TEXT, split_points=points, asked=asked)
    assert "\n" not in str(caught.value)


def test_split_points_decide() -> None:
    cut = find_cut(Language(), 3, TEXT, split_points=["blocks.2", "head"])
    assert [boundary.before for boundary in cut.boundaries] == ["blocks.2", "head"]
    assert "split_points" in cut.explanation[0]
    # Inside a block, what goes past the point travels too.
    inside = find_cut(Language(), 2, TEXT, split_points=["blocks.1.mlp"])
    assert {carried.path for carried in inside.boundaries[0].carries} == {"", "blocks.0"}


def test_a_model_that_is_called_twice_for_a_loss_is_refused() -> None:
    with pytest.raises(PlanError, match="exactly once"):
        find_cut(Language(), 2, TEXT, compute=lambda model, text: (model(text) + model(text)).sum())


class Moody(nn.Module):
    """What it computes depends on the values inside, so that no other rank can follow."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.layers[0](x)
        many = int(first.abs().sum() > 0) + 1
        return self.layers[2](self.layers[1](first)) * many


def test_a_cut_that_computes_something_else_is_not_used() -> None:
    with pytest.raises(PlanError, match="do not compute what the whole model computes .*the loss is different"):
        find_cut(Moody(), 2, torch.randn(2, 4), costs=Ones())


def test_a_batch_on_which_the_model_goes_another_way_is_an_error() -> None:
    class Early(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.one(x) if len(x) == 1 else self.two(self.one(x))

    model = Early()
    stage = build_stage(model, find_cut(model, 2, torch.randn(2, 4)), 0)
    with pytest.raises(JobError, match='never called "two"'):
        stage.run((), lambda module: module(torch.randn(1, 4)))


def test_measured_parts_have_the_cost_of_what_is_in_them() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    seconds = measure(model, torch.randn(4, 8), default_compute, ["1", "2"])
    assert len(seconds) == 3 and all(second > 0 for second in seconds)
    assert all(p.grad is None for p in model.parameters())
