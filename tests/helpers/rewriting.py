"""Holding rewritten models against their authors' code."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from shoal.rewrites.install import install


def run(model: nn.Module, *args: Any, **kwargs: Any) -> list[torch.Tensor]:
    """Output, gradients and buffers of a pass, with random streams seeded."""
    torch.manual_seed(1)
    model.zero_grad()
    output = model(*args, **kwargs)
    output.square().sum().backward()
    found = [output.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
    return found + [b.detach().clone() for b in model.buffers()]


def same(model: nn.Module, *args: Any, names: tuple[str, ...] = ("relu_pool", "flatten"), **kwargs: Any) -> dict[str, int]:
    """Assert that rewriting changes nothing, in training and in evaluation; return what was rewritten."""
    model.double()
    truth, keys = run(copy.deepcopy(model), *args, **kwargs), list(model.state_dict())
    installed = install(model, names)
    for a, b in zip(truth, run(model, *args, **kwargs), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-9, atol=1e-10)
    assert list(model.state_dict()) == keys
    model.eval()
    with torch.no_grad():
        torch.manual_seed(2)
        mine = model(*args, **kwargs)
        installed.remove()
        torch.manual_seed(2)
        torch.testing.assert_close(mine, model(*args, **kwargs), rtol=1e-9, atol=1e-10)
    model.train()
    return installed.applied.places
