"""Where BatchNorm, a shortcut and a ReLU become one, and where they stay three."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from rewriting import same
from torch import nn
from torch.nn import functional as F

from shoal.rewrites.install import install

LAST = torch.channels_last


class Net(nn.Module):
    """A convolution, a BatchNorm, and whatever is asked for behind it."""

    def __init__(self, behind: Callable[[Any, torch.Tensor, torch.Tensor], torch.Tensor], **options: Any) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16, **options)
        self.relu, self.short = nn.ReLU(inplace=True), nn.Conv2d(3, 16, 1)
        self.behind = behind

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.behind(self, self.conv(x), self.short(x)).mean((2, 3))


def added(net: Any, x: torch.Tensor, short: torch.Tensor) -> torch.Tensor:
    out = net.norm(x)
    out += short
    return net.relu(out)


def kept(net: Any, x: torch.Tensor, short: torch.Tensor) -> torch.Tensor:
    short += net.norm(x)
    return F.relu(short) + short


FOUND: dict[str, tuple[Callable[..., torch.Tensor], int]] = {
    "module": (lambda net, x, short: net.relu(net.norm(x)), 1),
    "sum": (lambda net, x, short: F.relu(short + net.norm(x)), 1),
    "in place": (added, 1),
    "twice": (lambda net, x, short: F.relu(net.norm(F.relu(net.norm(x)) + short) + x), 2),
    "broadcast": (lambda net, x, short: F.relu(net.norm(x) + short.mean((2, 3), keepdim=True)), 1),
    "no ReLU": (lambda net, x, short: net.norm(x) + short, 0),
    "scaled": (lambda net, x, short: F.relu(torch.add(net.norm(x), short, alpha=2)), 0),
    "used twice": (lambda net, x, short: F.relu(y := net.norm(x)) + y, 0),
    "itself": (lambda net, x, short: F.relu((y := net.norm(x)) + y), 0),
    "seen by others": (kept, 0),
}


def pictures(layout: torch.memory_format = LAST) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(3, 3, 6, 5, dtype=torch.float64).contiguous(memory_format=layout)


@pytest.mark.parametrize("case", FOUND)
def test_places_and_results(case: str) -> None:
    behind, places = FOUND[case]
    torch.manual_seed(0)
    assert same(Net(behind), pictures(), names=("norm_relu",)).get("norm_relu", 0) == places


@pytest.mark.parametrize("options", [{"momentum": None}, {"track_running_stats": False}, {"affine": False}, {"momentum": 0.3}])
def test_options_and_layouts(options: dict[str, Any]) -> None:
    for layout in (LAST, torch.contiguous_format):
        torch.manual_seed(0)
        assert same(Net(added, **options), pictures(layout), names=("norm_relu",)) == {"norm_relu": 1}


def test_a_frozen_norm_and_one_with_a_hook_stay_what_they_are() -> None:
    torch.manual_seed(0)
    model = Net(added).double()
    installed = install(model, ("norm_relu",))
    model.norm.eval()
    before = model.norm.running_mean.clone()
    model(pictures())
    assert torch.equal(model.norm.running_mean, before)
    installed.remove()
    model.norm.train().register_forward_hook(lambda _m, _i, out: out * 2)
    assert same(model, pictures(), names=("norm_relu",)) == {}
