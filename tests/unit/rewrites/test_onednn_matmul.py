"""Products by oneDNN as a rewrite: found where there is one, checked in float32, and gone when the rewrites are removed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shoal.kernels.onednn import available
from shoal.rewrites.install import install

NAMES = ("onednn_matmul",)
pytestmark = pytest.mark.skipif(not available(), reason="this torch was built without oneDNN")


def test_it_is_there_between_install_and_remove() -> None:
    model, x = nn.Sequential(nn.Linear(256, 300), nn.ReLU(), nn.Linear(300, 256)), torch.randn(64, 256)
    own = model(x)
    installed = install(model, NAMES)
    found = model(x)
    assert installed.applied.places == {"onednn_matmul": 1}
    assert torch.allclose(own, found, 1e-4, 1e-5)
    installed.remove()
    assert torch.equal(model(x), own)
    installed.resume()
    assert torch.equal(model(x), found)
    installed.remove()


def test_a_model_without_large_products_has_no_place_for_it() -> None:
    model, x = nn.Linear(8, 8), torch.randn(4, 8)
    installed = install(model, NAMES)
    model(x)
    assert not installed.applied.places
    installed.remove()
