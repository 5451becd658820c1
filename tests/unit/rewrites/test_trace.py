"""Models whose code does more than a graph of it would, or something else later on, compute as their authors wrote them."""

from __future__ import annotations

import copy
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from rewriting import run
from torch import nn
from torch.utils.checkpoint import checkpoint

from shoal.rewrites.install import install

_NAMES = ("merge_linears", "attention")


class _Clamped(torch.autograd.Function):
    """Makes itself felt only where gradients are large, which they are not on the batch that rewrites are checked on."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x * 1.0

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return gradients[0].clamp(-1, 1)


class _Reversed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> torch.Tensor:
        return -gradients[0]


_reversed = _Reversed.apply


class _Gated(nn.Module):
    """Two layers with the same input, which would be merged."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(8, 16), nn.Linear(16, 4)
        self.settings: dict[str, Any] = {"scale": 1.0, "steps": [1.0]}
        self.shared = types.SimpleNamespace(scale=1.0, calls=0)
        self.own = torch.Generator().manual_seed(1)
        self.activation: Callable[[torch.Tensor], torch.Tensor] = torch.relu
        self.last: nn.Module = nn.Tanh()

    def gate(self, x: torch.Tensor) -> torch.Tensor:
        return self.activation(self.a(x)) * torch.sigmoid(self.b(x))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scale = self.settings["scale"] * self.settings["steps"][0] * self.shared.scale
        return self.last(self.c(self.gate(x))) * scale


class _ClampsGradients(_Gated):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Clamped.apply(self.c(self.gate(x)))


class _ReversesGradients(_Gated):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(_reversed(self.gate(x)))


class _Autocasts(_Gated):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            gate = self.gate(x)
        return self.c(gate.to(x.dtype))


class _WithoutGradients(_Gated):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            gate = self.gate(x)
        return self.c(gate)


class _Checkpoints(_Gated):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(checkpoint(self.gate, x, use_reentrant=False))


class _CountsDeepInside(_Gated):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.settings["steps"].append(1.0)
        self.shared.calls += 1
        return self.c(self.gate(x)) * len(self.settings["steps"]) * self.shared.calls


class _DrawsFromItsOwnStream(_Gated):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c(self.gate(x)) + torch.rand(4, generator=self.own)


class _UsesOneOfTwo(_Gated):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, _ = self.a(x), self.b(x)
        return self.c(first)


@pytest.mark.parametrize(
    "kind",
    [
        _ClampsGradients, _ReversesGradients, _Autocasts, _WithoutGradients, _Checkpoints, _CountsDeepInside,
        _DrawsFromItsOwnStream, _UsesOneOfTwo,
    ],
)  # fmt: skip
def test_code_that_a_graph_would_not_stand_for_runs_as_it_is(kind: type[_Gated]) -> None:
    torch.manual_seed(0)
    theirs = kind()
    ours = copy.deepcopy(theirs)
    installed = install(ours, _NAMES)
    for step in range(3):
        x = 100.0**step * torch.randn(5, 8, generator=torch.Generator().manual_seed(step))
        truth, found = run(theirs, x), run(ours, x)
        assert all(torch.equal(a, b) for a, b in zip(truth, found, strict=True))
        assert [p.grad is None for p in theirs.parameters()] == [p.grad is None for p in ours.parameters()]
    assert not installed.applied.places


def _settings(model: Any) -> None:
    model.settings["scale"] = 3.0


def _list_in_settings(model: Any) -> None:
    model.settings["steps"][0] = 3.0


def _shared(model: Any) -> None:
    model.shared.scale = 3.0


def _function(model: Any) -> None:
    model.activation = torch.tanh


def _child(model: Any) -> None:
    model.last = nn.Sigmoid()


@pytest.mark.parametrize("change", [_settings, _list_in_settings, _shared, _function, _child])
def test_a_graph_is_used_only_while_everything_is_what_it_was(change: Callable[[Any], None]) -> None:
    torch.manual_seed(0)
    theirs = _Gated().double()
    ours = copy.deepcopy(theirs)
    installed = install(ours, _NAMES)
    x = torch.randn(5, 8, dtype=torch.float64)
    for step in range(2):
        if step:
            change(theirs), change(ours)
        for a, b in zip(run(theirs, x), run(ours, x), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-10)
    assert installed.applied.places == {"merge_linears": 1}


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.dropout = nn.Dropout(0.0)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        scores = (self.query(x) @ self.key(x).transpose(-2, -1) / 4.0).masked_fill(mask, float("-inf"))
        return self.dropout(scores.softmax(-1)) @ self.value(x)


def test_a_dropout_that_is_turned_on_later_is_not_left_out() -> None:
    torch.manual_seed(0)
    theirs = _Attention().double()
    ours = copy.deepcopy(theirs)
    installed = install(ours, _NAMES)
    given = torch.randn(3, 5, 8, dtype=torch.float64), torch.triu(torch.ones(5, 5, dtype=torch.bool), 1)
    for chance in (0.0, 0.5):
        theirs.dropout.p = ours.dropout.p = chance
        for a, b in zip(run(theirs, *given), run(ours, *given), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-10)
    assert installed.applied.places == {"merge_linears": 1, "attention": 1}


def test_without_rewrites_code_runs_as_often_as_it_is_called() -> None:
    calls = []

    class Counts(_Gated):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            calls.append(len(calls))
            return super().forward(x)

    model = Counts()
    installed = install(model, ())
    run(model, torch.randn(5, 8))
    assert calls == [0]
    installed.remove()
