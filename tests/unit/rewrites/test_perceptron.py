"""Which chains of linear layers become one operator, and that nothing else changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from rewriting import same
from torch import nn
from torch.nn import functional as F

from shoal.rewrites.install import install


class Net(nn.Module):
    """Three layers and what is done with them."""

    def __init__(self, how: Callable[[Any, torch.Tensor], torch.Tensor], bias: bool = True) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(11, 72, bias), nn.Linear(72, 48), nn.Linear(48, 3, bias)
        self.relu, self.how = nn.ReLU(inplace=True), how

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.how(self, x)


def changed(net: Any, x: torch.Tensor) -> torch.Tensor:
    out = net.c(net.b(F.relu(net.a(x))))
    out += 1
    return out


HOW: dict[str, tuple[Callable[[Any, torch.Tensor], torch.Tensor], int]] = {
    "relu between": (lambda net, x: net.c(net.relu(net.b(net.relu(net.a(x))))), 1),
    "relu last": (lambda net, x: F.relu(net.c(net.b(net.a(x).relu()))), 1),
    "changed in place": (changed, 1),
    "another operation between": (lambda net, x: net.c(F.relu(net.b(F.relu(net.a(x)))).tanh()), 1),
    "seen by others": (lambda net, x: net.c(h := net.b(net.a(x))) + h[:, :3], 1),
    "alone": (lambda net, x: net.c(net.b(net.a(x).tanh()).tanh()), 0),
    "more dims": (lambda net, x: net.c(net.b(net.a(x.view(5, -1, 11)))).sum(1), 1),
    "strided": (lambda net, x: net.c(net.b(net.a(x.t().contiguous().t()))), 1),
}


@pytest.mark.parametrize("case", HOW)
@pytest.mark.parametrize("threads", [1, 2])
def test_places_and_results(case: str, threads: int) -> None:
    how, places = HOW[case]
    torch.manual_seed(0)
    x = torch.randn(115, 11, dtype=torch.float64, requires_grad=True)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        assert same(Net(how, bias=threads == 2), x, names=("perceptron",)).get("perceptron", 0) == places
    finally:
        torch.set_num_threads(before)


def test_the_inputs_gradient_frozen_layers_and_second_derivatives() -> None:
    torch.manual_seed(0)
    model = Net(HOW["relu between"][0]).double()
    model.b.weight.requires_grad_(False)
    x = torch.randn(50, 11, dtype=torch.float64, requires_grad=True)

    def answers() -> list[torch.Tensor]:
        wanted = [x, *(p for p in model.parameters() if p.requires_grad)]
        first = torch.autograd.grad(model(x).square().sum(), wanted, create_graph=True)
        return [*first, *torch.autograd.grad(sum(g.square().sum() for g in first), wanted)]

    truth = answers()
    assert install(model, ("perceptron",)).applied.places == {}
    for a, b in zip(truth, answers(), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-10)
    model(x).square().sum().backward()
    assert model.b.weight.grad is None and model.b.bias.grad is not None and x.grad is not None


def test_a_row_has_the_same_bits_in_any_company_and_nan_is_not_hidden() -> None:
    torch.manual_seed(0)
    model, x = Net(HOW["relu between"][0]), torch.randn(101, 11)
    install(model, ("perceptron",))
    whole = model(x)
    assert all(torch.equal(model(x[k : k + n]), whole[k : k + n]) for k, n in ((0, 1), (7, 50), (95, 6)))
    x[3, 4] = torch.nan
    assert model(x).isnan().any(1).nonzero().tolist() == [[3]]
