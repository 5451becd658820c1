from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from shoal.axes import recompute
from shoal.errors import PlanError


class Block(nn.Module):
    """Attention, an MLP and dropout at both."""

    def __init__(self, width: int, attention_dropout: float = 0.0) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Dropout(0.3), nn.Linear(4 * width, width))
        self.attention_dropout = attention_dropout

    def forward(self, x: torch.Tensor, *, scale: float = 1.0) -> torch.Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(self.norm(x)).chunk(3, -1))
        dropout = self.attention_dropout if self.training else 0.0
        y = functional.scaled_dot_product_attention(q, k, v, dropout_p=dropout)
        x = x + functional.dropout(y.transpose(1, 2).flatten(2), 0.2, self.training)
        return x + scale * self.mlp(x)


class Tied(nn.Module):
    def __init__(self, attention_dropout: float = 0.0) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 8)
        self.blocks = nn.ModuleList(Block(8, attention_dropout) for _ in range(3))
        self.blocks[2].mlp[0].weight = self.blocks[0].mlp[0].weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, scale=0.5)
        return functional.linear(x, self.embed.weight)


def make(attention_dropout: float = 0.0) -> Tied:
    torch.manual_seed(1)
    return Tied(attention_dropout)


TOKENS = torch.arange(24).view(4, 6) % 11


def gradients(model: nn.Module, bf16: bool) -> dict[str, torch.Tensor]:
    torch.manual_seed(7)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        loss = functional.cross_entropy(model(TOKENS).flatten(0, 1).float(), TOKENS.flatten())
    loss.backward()
    # The next random number too: a second pass that drew other ones, or more, would change it.
    return {**{n: p.grad for n, p in model.named_parameters() if p.grad is not None}, "next": torch.rand(3)}


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("attention_dropout", [0.0, 0.4])
@pytest.mark.parametrize("mode", ["full", "selective"])
def test_gradients_are_the_same_bit_for_bit(mode: str, attention_dropout: float, bf16: bool) -> None:
    expected = gradients(make(attention_dropout), bf16)
    model = make(attention_dropout)
    assert recompute.apply(model, mode) == 3
    found = gradients(model, bf16)
    assert found.keys() == expected.keys() and len(found) > 10
    unequal = [name for name in expected if not torch.equal(found[name], expected[name])]
    # Two blocks use it, and autocast adds its gradients in bfloat16 where nothing is recomputed.
    shared = "blocks.0.mlp.0.weight"
    assert unequal == ([shared] if bf16 else [])
    torch.testing.assert_close(found[shared], expected[shared], rtol=0.05, atol=1e-3)


def saved_bytes(model: nn.Module) -> int:
    """What autograd itself saves; what ``selective`` caches beside it is measured in ``test_activations.py``."""
    sizes: dict[int, int] = {}
    kept = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        sizes[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
        return tensor

    weights = {p.untyped_storage()._cdata for p in model.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        model(TOKENS)
    return sum(size for key, size in sizes.items() if key not in weights)


def test_less_is_saved() -> None:
    plain, full = make(), make()
    recompute.apply(full, "full")
    assert saved_bytes(full) < saved_bytes(plain) / 3


def test_names_types_and_copies_are_as_before() -> None:
    model = make()
    before = list(model.state_dict())
    kinds = [str(module) for module in model.modules()]
    recompute.apply(model, "full")
    recompute.apply(model, "selective")
    assert list(model.state_dict()) == before and [str(module) for module in model.modules()] == kinds
    assert all(isinstance(block, Block) for block in model.blocks)
    assert len({type(block) for block in model.blocks}) == 1
    twin = copy.deepcopy(model)
    assert torch.equal(gradients(twin, False)["embed.weight"], gradients(make(), False)["embed.weight"])
    assert recompute.apply(model, "none") == 0
    assert type(model.blocks[0]) is Block


def test_nothing_is_recomputed_without_gradients() -> None:
    model = make().eval()
    expected = model(TOKENS)
    recompute.apply(model, "full")
    calls: list[int] = []
    model.blocks[0].norm.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        assert torch.equal(model(TOKENS), expected)
    assert calls == [1]
    model(TOKENS).sum().backward()
    assert calls == [1, 1, 1]


def test_single_layers_are_left_as_they_are() -> None:
    assert recompute.apply(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)), "full") == 0


def test_what_cannot_be_meant_is_refused() -> None:
    with pytest.raises(PlanError, match="full, selective or none"):
        recompute.apply(make(), "some")
    model = make()
    patched: Any = model.blocks[1]
    patched.forward = lambda x, scale: x
    with pytest.raises(PlanError, match="Block has a forward of its own"):
        recompute.apply(model, "full")
