"""Finding a tensor layout: what is split, what stays whole and why, what is refused; and the arithmetic of split views."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from shoal.axes import tensor
from shoal.axes.tensor_cut import Cut, Team, assemble, even_widths, ranges_of
from shoal.comm.parts import take_ranges
from shoal.comm.table import Region
from shoal.errors import JobError, PlanError


def rehearsed(x: torch.Tensor, dim: int, widths: tuple[tuple[int, ...], ...]) -> Cut:
    """A tensor with all of its parts in this process."""
    team = Team(len(widths[0]))
    return Cut(tuple(take_ranges(x, dim, ranges_of(widths, t)) for t in team.members), dim, widths, team)


def layout_of(model: nn.Module, ways: int = 2, **options: Any) -> tensor.TensorLayout:
    x = options.pop("x") if "x" in options else torch.randn(2, 6)
    return tensor.find_layout(model, ways, example=lambda m: m(x).square().mean(), samples=2, **options)


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 101), nn.ReLU(), nn.Linear(101, 6))


class Attention(nn.Module):
    def __init__(self, heads: int = 4) -> None:
        super().__init__()
        self.n_heads = heads
        self.qkv, self.out = nn.Linear(24, 72), nn.Linear(24, 24)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, t, c = x.shape
        q, k, v = self.qkv(x).view(b, t, 3, self.n_heads, -1).permute(2, 0, 3, 1, 4)
        return self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(b, t, c))


# -- views, by all factorings of a dim ---------------------------------------------------------------------------


@st.composite
def views(draw: st.DrawFn) -> tuple[tuple[int, ...], int, tuple[tuple[int, ...], ...], tuple[int, ...]]:
    """A shape, which dim is split and how, and a shape to view it as."""
    factors = draw(st.lists(st.sampled_from([1, 2, 3, 4]), min_size=2, max_size=5))

    def grouped() -> tuple[int, ...]:
        shape: list[int] = []
        for factor in factors:
            if shape and draw(st.booleans()):
                shape[-1] *= factor
            else:
                shape.append(factor)
        return tuple(shape)

    old, new = grouped(), grouped()
    dim = draw(st.integers(0, len(old) - 1))
    blocks = draw(st.sampled_from([b for b in (1, 2, 3) if old[dim] % b == 0]))
    return old, dim, (even_widths(old[dim] // blocks, draw(st.sampled_from([2, 3]))),) * blocks, new


@settings(max_examples=150, deadline=None)
@given(views())
def test_a_split_view_is_the_view_of_the_whole(case: Any) -> None:
    old, dim, widths, new = case
    x = torch.arange(torch.Size(old).numel()).view(old)
    got = rehearsed(x, dim, widths).view(new)
    assert torch.equal(tensor.plain(got), x.view(new))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x[..., 1:3, :], lambda x: x[:, None, :, 0], lambda x: x.transpose(1, 3).flatten(1, 2),
        lambda x: x.sum(1), lambda x: x.sum((1, 2)), lambda x: x.mean(-1, keepdim=True), lambda x: x.softmax(1),
        lambda x: x.unbind(2)[1], lambda x: torch.cat([x, x * 2], -1), lambda x: torch.stack([x, x], 1),
        lambda x: x.norm(2, 3), lambda x: x.topk(2, 3).values, lambda x: x.topk(1, 1).values, lambda x: x.flip(1),
        lambda x: x.roll(1, 1), lambda x: F.normalize(x, 2.0, 1), lambda x: x.var(1),
        lambda x: torch.einsum("bhij,bhkj->bik", x, x), lambda x: x @ x.mT, lambda x: x.repeat_interleave(2, dim=1),
        lambda x: x.expand(2, *x.shape), lambda x: x[:, [0, 2]], lambda x: x.squeeze(0),
        lambda x: x.masked_fill(x > 0.5, -1.0), lambda x: torch.where(x > 0, x, torch.arange(6.0).view(6, 1, 1)),
        lambda x: x.cumsum(1), lambda x: x.chunk(2, 1)[1], lambda x: F.layer_norm(x, (5,)),
        lambda x: F.layer_norm(x, x.shape[1:]), lambda x: x.movedim(1, -1), lambda x: x.amax((1, 2, 3)),
        lambda x: torch.clamp(x, out=torch.empty_like(tensor.plain(x)), min=0.1), lambda x: x.tril(),
        lambda x: x.sum(()),
    ],
)  # fmt: skip
def test_functions_of_a_split_tensor(function: Any) -> None:
    x = torch.rand(1, 6, 3, 5)
    assert torch.allclose(tensor.plain(function(rehearsed(x, 1, (even_widths(6, 4),)))), function(x))


def test_parts_come_together_again() -> None:
    x = torch.arange(24).view(2, 12)
    widths = (even_widths(5, 3), even_widths(7, 3))
    parts = [take_ranges(x, 1, ranges_of(widths, t)) for t in range(3)]
    assert [p.shape[1] for p in parts] == [5, 4, 3] and torch.equal(assemble(parts, 1, widths), x)


# -- layouts -----------------------------------------------------------------------------------------------------


def test_a_pair_of_linears_with_uneven_widths() -> None:
    layout = layout_of(mlp())
    assert layout.shards["0.weight"] == (Region(0, ((0, 51),)), Region(0, ((51, 101),)))
    assert layout.shards["0.bias"] == layout.shards["0.weight"]
    assert layout.shards["2.weight"] == (Region(1, ((0, 51),)), Region(1, ((51, 101),)))
    assert "2.bias" not in layout.shards and layout.why is None and layout.replicated == ()
    assert pickle.loads(pickle.dumps(layout)) == layout


def test_fused_heads_are_split_in_each_of_query_key_and_value() -> None:
    layout = layout_of(Attention(), x=torch.randn(2, 3, 24))
    assert layout.shards["qkv.weight"][1] == Region(0, ((12, 24), (36, 48), (60, 72)))
    assert layout.shards["out.weight"][0] == Region(1, ((0, 12),))


@pytest.mark.parametrize(
    ("model", "ways", "words"),
    [
        (Attention(8), 3, "works on 8 heads, which 3 workers cannot share evenly; tp=2, tp=4 or tp=8 would fit"),
        (nn.Sequential(Attention(4), nn.LayerNorm(24), Attention(3)), 2, '{"*": "replicate"}'),
        (nn.TransformerEncoderLayer(24, 6, 8, batch_first=True), 4, "tp=2, tp=3 or tp=6 would fit"),
    ],
)
def test_heads_that_do_not_divide_are_refused(model: nn.Module, ways: int, words: str) -> None:
    with pytest.raises(PlanError) as error:
        layout_of(model, ways, x=torch.randn(2, 3, 24))
    assert words in str(error.value) and "\n" not in str(error.value)


def test_heads_that_do_not_divide_stay_whole_where_that_is_asked_for() -> None:
    layout = layout_of(Attention(8), 3, x=torch.randn(2, 3, 24), override={"qkv": "replicate"})
    assert dict(layout.replicated)["qkv"] == "tensor_plan says so"


def test_nothing_to_split_is_one_sentence() -> None:
    layout = layout_of(nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 1)))
    assert not layout.shards and layout.why is not None and layout.why.startswith("tp=2 splits nothing in this model: ")
    assert [path for path, _ in layout.replicated] == ["0", "1"]
    assert tensor.traffic(layout, 100) == {}


def test_finding_a_layout_leaves_the_model_as_it_was() -> None:
    model = nn.Sequential(
        nn.Linear(6, 200), nn.BatchNorm1d(200), nn.Dropout(0.5), nn.Linear(200, 300), nn.Linear(300, 6)
    )
    before = {k: v.clone() for k, v in model.state_dict().items()}
    kinds = [type(m) for m in model.modules()]
    x, state = torch.randn(2, 6), torch.get_rng_state()
    layout_of(model, x=x)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [type(m) for m in model.modules()] == kinds and torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in model.parameters()) and not any(m._forward_pre_hooks for m in model.modules())
    assert "apply" in vars(torch.autograd.Function) and not hasattr(
        torch.autograd.Function.apply, "knows_split_tensors"
    )


def test_tied_weights_are_split_as_one() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding, self.head = nn.Embedding(33, 6), nn.Linear(6, 33, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return self.head(self.embedding(ids))

    ids = torch.randint(33, (2, 5))
    model = Tied()
    found = tensor.find_layout(model, 2, example=lambda m: F.cross_entropy(m(ids).transpose(1, 2), ids))
    assert found.loss_parallel
    assert (
        found.shards["embedding.weight"]
        == found.shards["head.weight"]
        == (Region(0, ((0, 17),)), Region(0, ((17, 33),)))
    )
    squared = tensor.find_layout(model, 2, example=lambda m: m(ids).exp().mean())
    assert not squared.loss_parallel


def test_a_model_on_the_meta_device_needs_no_trial() -> None:
    with torch.device("meta"):
        model = nn.Sequential(nn.TransformerEncoder(nn.TransformerEncoderLayer(24, 4, 48), 2), mlp())
    layout = tensor.find_layout(model, 2)
    assert {name.rpartition(".")[0] for name in layout.shards} >= {
        "0.layers.0.self_attn", "0.layers.1.self_attn.out_proj", "0.layers.0.linear1", "0.layers.1.linear2", "1.0", "1.2",
    }  # fmt: skip
    assert layout.shards["0.layers.0.self_attn.in_proj_weight"][0] == Region(0, ((0, 12), (24, 36), (48, 60)))


def test_traffic_grows_with_the_batch() -> None:
    layout = layout_of(nn.Sequential(nn.LayerNorm(6), mlp()))
    # One all-reduce forward of (2, 6) float32, one backward; each worker of two sends what there is once.
    assert tensor.traffic(layout, 2) == {"all_reduce": 2 * 2 * 6 * 4}
    assert tensor.traffic(layout, 20) == {"all_reduce": 2 * 20 * 6 * 4}


# -- what is asked for -------------------------------------------------------------------------------------------


def test_torchs_own_styles_are_understood() -> None:
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 6))
    layout = layout_of(model, override={"0": RowwiseParallel(), "1": ColwiseParallel()})
    assert layout.shards["0.weight"][0] == Region(1, ((0, 3),)) and layout.shards["1.weight"][0] == Region(0, ((0, 3),))


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        ({"0": "colwize"}, 'Did you mean "colwise"'),
        ({"fc1": "colwise"}, 'tensor_plan names "fc1", which no module is called'),
        ({"1": "colwise"}, 'colwise of "1", where no layer can be split so'),
        ({"0": 3}, "tensor_plan has a int"),
        (["0"], "tensor_plan is a list"),
    ],
)
def test_an_override_that_makes_no_sense(plan: Any, words: str) -> None:
    with pytest.raises(JobError) as error:
        layout_of(mlp(), override=plan)
    assert words in str(error.value)


def test_an_error_of_the_model_is_not_hidden() -> None:
    class Broken(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Linear(6, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        layout_of(Broken())


def test_code_that_fails_on_split_tensors_is_left_whole() -> None:
    class Picky(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 8), nn.Linear(8, 6)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = self.a(x)
            if type(y) is not torch.Tensor:
                raise TypeError("only plain tensors")
            return self.b(y)

    layout = layout_of(Picky())
    assert not layout.shards and dict(layout.replicated)["a"] == "split, the model's own code fails (TypeError)"
