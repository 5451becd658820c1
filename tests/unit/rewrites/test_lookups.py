"""Which lookups are merged, that nothing else changes, and that rows that do not exist are said to be none."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from rewriting import same
from torch import nn

from shoal.rewrites.install import install

IDS = torch.tensor([[0, 3, 3], [7, 0, 2], [3, 3, 3], [1, 7, 5], [2, 0, 0]])


class Net(nn.Module):
    """Two tables of unlike widths, one of them with a row that is never trained, and what is done with them."""

    def __init__(self, how: Callable[[Any, torch.Tensor], torch.Tensor], **options: Any) -> None:
        super().__init__()
        self.a, self.b = nn.Embedding(8, 1, **options), nn.Embedding(8, 19, padding_idx=0, **options)
        self.scale, self.how = nn.Parameter(torch.ones(1)), how

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.how(self, ids)


def _both(net: Any, ids: torch.Tensor) -> torch.Tensor:
    return net.a(ids).sum(dim=(1, 2)) * net.scale + net.b(ids).flatten(1).square().sum(1)


def _unused(net: Any, ids: torch.Tensor) -> torch.Tensor:
    return net.a(ids).sum() * 0 + net.b(ids).sum((-1, -2)) * net.scale


HOW: dict[str, tuple[Callable[[Any, torch.Tensor], torch.Tensor], int]] = {
    "two of the same numbers": (_both, 1),
    "all summed": (_unused, 1),
    "one dim summed": (lambda net, ids: net.b(ids).sum(1) * net.scale + net.b(ids).sum(dim=-1, keepdim=True).sum(1), 1),
    "seen by others": (lambda net, ids: (h := net.b(ids)).sum((1, 2)) + h[:, 0, 0] * net.scale, 1),
    "other numbers": (lambda net, ids: net.a(ids).sum((1, 2)) + net.b(7 - ids).sum((1, 2)) * net.scale, 2),
    "one number a sample": (lambda net, ids: net.a(ids[:, 0]).sum(1) + net.b(ids[:, 0]).sum(-1) * net.scale, 2),
    "strided": (lambda net, ids: net.b(ids.t()).sum((1, 2)) * net.scale, 1),
    "changed in place": (lambda net, ids: net.b(ids).mul_(2).sum((1, 2)) * net.scale, 1),
}


@pytest.mark.parametrize("case", HOW)
def test_places_and_results(case: str) -> None:
    how, places = HOW[case]
    torch.manual_seed(0)
    assert same(Net(how), IDS, names=("lookups",)).get("lookups", 0) == places


@pytest.mark.parametrize("options", [{"sparse": True}, {"scale_grad_by_freq": True}, {"max_norm": 1.0}])
def test_tables_with_gradients_or_rows_of_their_own_kind_are_left_alone(options: dict[str, Any]) -> None:
    net = Net(_both, **options)
    installed = install(net, ("lookups",))
    net(IDS).sum().backward()
    assert installed.applied.places == {}


def test_second_derivatives_frozen_tables_and_numbers_of_another_type() -> None:
    torch.manual_seed(0)
    net = Net(_both).double()
    wanted = [p for p in net.parameters()]

    def answers(ids: torch.Tensor) -> list[torch.Tensor]:
        first = torch.autograd.grad(net(ids).square().sum(), wanted, create_graph=True)
        return [*first, *torch.autograd.grad(sum(g.square().sum() for g in first), wanted)]

    truth = answers(IDS)
    installed = install(net, ("lookups",))
    for ids in (IDS, IDS.int()):
        for a, b in zip(truth, answers(ids), strict=True):
            torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-10)
    assert installed.applied.places == {"lookups": 1}
    net.b.weight.requires_grad_(False)
    net(IDS).sum().backward()
    assert net.b.weight.grad is None and net.a.weight.grad is not None


def test_a_row_that_does_not_exist_is_refused_as_torch_does() -> None:
    net = Net(_both)
    install(net, ("lookups",))
    net(IDS)
    for wrong in (-1, 8):
        with pytest.raises(IndexError, match="out of range"):
            net(torch.tensor([[0, wrong, 1]]))
    assert net(torch.zeros(0, 3, dtype=torch.int64)).shape == (0,)
