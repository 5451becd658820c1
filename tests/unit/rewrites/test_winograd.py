"""Where convolutions are replaced by Winograd's filtering, and where they are left alone."""

from __future__ import annotations

import pytest
import torch
from rewriting import same
from torch import nn
from torch.nn import functional as F

from shoal.rewrites.install import install

LAST = torch.channels_last


class Net(nn.Module):
    """A small net of the kind of VGG and U-Net: odd sizes, biases, a skip that is put beside, a shared layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.down, self.norm = nn.Conv2d(16, 24, 3, padding="same", bias=False), nn.BatchNorm2d(24)
        self.shared = nn.Conv2d(24, 24, 3, padding=1)
        self.up = nn.Conv2d(40, 16, 3, padding=1)
        self.left = nn.ModuleList(
            [
                nn.Conv2d(16, 16, 3, padding=1, groups=2), nn.Conv2d(16, 16, 3, padding=2, dilation=2), nn.Conv2d(16, 16, 1),
                nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect"), nn.Conv2d(16, 16, 3, stride=2, padding=1),
                nn.Conv2d(16, 16, 3),
            ]
        )  # fmt: skip
        self.head = nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.relu(self.stem(x))
        y = F.relu(self.norm(self.down(F.max_pool2d(x, 2))))
        y = self.shared(F.relu(self.shared(y)))
        x = self.up(torch.cat([x, F.interpolate(y, x.shape[2:])], 1))
        for layer in self.left:
            x = layer(x)
        return self.head(x.mean((2, 3)))


def pictures(layout: torch.memory_format = LAST) -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(3, 3, 15, 13, dtype=torch.float64).contiguous(memory_format=layout)


@pytest.mark.parametrize("layout", [LAST, torch.contiguous_format])
def test_only_plain_3_by_3_convolutions_are_replaced(layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    # The two calls of the shared layer are two places.
    assert same(Net(), pictures(layout), names=("winograd",)) == {"winograd": 4}


def test_a_hook_or_a_parametrization_keeps_a_layer_as_it_is() -> None:
    model = Net()
    model.up.register_forward_hook(lambda _m, _i, out: out * 2)
    nn.utils.parametrizations.weight_norm(model.down)
    assert same(model, pictures(), names=("winograd",)) == {"winograd": 2}


@torch.no_grad()
def test_evaluation_folds_batchnorm_and_prepares_weights() -> None:
    torch.manual_seed(0)
    model = Net().double()
    model(pictures())
    model.eval()
    wanted = model(pictures())
    for frozen in (False, True):
        installed = install(model, ("fold_batchnorm", "winograd"), frozen)
        for _ in range(2):
            torch.testing.assert_close(model(pictures()), wanted, rtol=1e-9, atol=1e-12)
        assert installed.applied.places == {"fold_batchnorm": 1, "winograd": 4}
        installed.remove()
