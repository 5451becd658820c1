"""Attention as people write it, with its query, key and value layers merged: the same results."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rewriting import same
from torch import nn
from torch.nn import functional as F

WAYS: dict[str, Callable[[Any, Any, Any, Any], Any]] = {
    "divided": lambda self, q, k, v: self.drop(F.softmax(q @ k.transpose(-2, -1) / math.sqrt(4), dim=-1)) @ v,
    "multiplied": lambda self, q, k, v: torch.matmul((torch.matmul(q, k.transpose(-1, -2)) * 0.5).softmax(-1), v),
    "query": lambda self, q, k, v: torch.matmul(self.soft(torch.matmul(q * 0.5, k.transpose(-2, -1))), v),
    "filled": lambda self, q, k, v: (
        torch.softmax((q @ k.transpose(-2, -1) * 0.5).masked_fill(self.mask == 0, float("-inf")), dim=-1) @ v
    ),
    "added": lambda self, q, k, v: F.softmax(q @ k.transpose(-2, -1) * 0.5 + self.bias, -1) @ v,
}
LEFT: dict[str, Callable[[Any, Any, Any, Any], Any]] = {
    "dropped": lambda self, q, k, v: F.dropout(F.softmax(q @ k.transpose(-2, -1), -1), 0.5, self.training) @ v,
    "looked at": lambda self, q, k, v: (w := F.softmax(q @ k.transpose(-2, -1), -1)) @ v + w.sum(),
    "other dim": lambda self, q, k, v: F.softmax(q @ k.transpose(-2, -1), -2) @ v,
    "scaled mask": lambda self, q, k, v: F.softmax((q @ k.transpose(-2, -1) + self.bias) * 0.5, -1) @ v,
}


class Attention(nn.Module):
    """8 wide, two heads, over sequences of five."""

    def __init__(self, way: Callable[[Any, Any, Any, Any], Any]) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))
        self.drop, self.soft = nn.Dropout(0.0), nn.Softmax(dim=-1)
        self.register_buffer("mask", torch.ones(5, 5).tril())
        self.register_buffer("bias", torch.randn(1, 1, 5, 5))
        self.way = way

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        n, t, _ = x.shape
        q, k, v = (layer(x).view(n, t, 2, 4).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.way(self, q, k, v).transpose(1, 2).reshape(n, t, 8)


@pytest.mark.parametrize("name", [*WAYS, *LEFT])
def test_attention_is_found_or_left(name: str) -> None:
    torch.manual_seed(0)
    model = Attention({**WAYS, **LEFT}[name])
    found = same(model, torch.randn(3, 5, 8, dtype=torch.float64), names=("merge_linears", "attention"))
    assert found["merge_linears"] == 1
    # Dropout does nothing in evaluation, so there it is found.
    assert found.get("attention", 0) == (name in WAYS or name == "dropped")


def test_a_row_without_any_place_is_not_a_number_as_written() -> None:
    model = Attention(WAYS["filled"]).double()
    model.mask.zero_()
    x = torch.randn(2, 5, 8, dtype=torch.float64)
    from shoal.rewrites.install import install

    assert model(x).isnan().all()
    install(model, ("attention",))
    assert model(x).isnan().all()


def test_layers_that_differ_are_not_merged() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(3, 2), nn.Linear(3, 4, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return torch.cat([self.a(x), self.b(x), self.a(x * 2)], -1)

    assert same(Two(), torch.randn(3, 3, dtype=torch.float64), names=("merge_linears",)) == {}
