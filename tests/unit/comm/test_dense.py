"""Passes over whole tensors, compiled and with torch."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from shoal.comm import dense


@pytest.fixture(params=["compiled", "torch"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> dense.Dense:
    if request.param == "torch":
        monkeypatch.setattr(dense.native, "load", object)
    dense.load.cache_clear()
    found = dense.load()
    dense.load.cache_clear()
    if type(found).__name__ != {"compiled": "_Compiled", "torch": "_Torch"}[request.param]:
        pytest.skip("no C compiler here")
    return found


# The last is written past the caches.
@pytest.mark.parametrize("count", [0, 1, 63, 1000, 2_100_001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_tensor_is_copied_and_looked_through(kind: dense.Dense, dtype: torch.dtype, count: int) -> None:
    source = torch.randn(count, generator=torch.Generator().manual_seed(0)).to(dtype)
    if count:
        source[0], source[-1] = torch.finfo(dtype).max, -torch.finfo(dtype).tiny
    target = torch.full((count + 1,), 7.0, dtype=dtype)
    assert kind.take(target[:count], source) in (True, None) and kind.finite(source)
    assert torch.equal(target[:count], source) and target[-1] == 7.0
    again, words = torch.zeros_like(target), np.array([4, 9], np.uint32)
    pairs = [(again[:count].view(torch.uint8), source.view(torch.uint8))]
    pull = kind.puller(words.ctypes.data, words.ctypes.data + 4, pairs)
    assert pull() == 4 and words.tolist() == [4, 0]
    assert torch.equal(again[:count], source) and again[-1] == 0.0
    words[0] = 5
    assert pull() == -1 and words.tolist() == [5, 1]
    for at, value in ((0, math.inf), (count // 2, math.nan), (count - 1, -math.inf)):
        if count:
            bad = source.clone()
            bad[at] = value
            assert kind.take(target[:count], bad) in (False, None) and not kind.finite(bad)
            assert torch.equal(target[:count].isfinite(), bad.isfinite())


def test_what_lies_otherwise_is_copied_all_the_same(kind: dense.Dense) -> None:
    wide = torch.randn(6, 4)
    for source in (wide.t(), wide.t().double(), wide[:, ::2].t()):
        target = torch.zeros(source.shape)
        assert kind.take(target, source) is not False
        assert torch.equal(target, source.float()) and kind.finite(source)
    wide[2, 2] = math.nan
    assert not kind.finite(wide.t())
