"""BatchNorm with an addition and a ReLU as one operator: torch's values, gradients and running averages."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from shoal.kernels import batchnorm
from shoal.kernels.batchnorm import batch_norm, fits

LAST = torch.channels_last

pytestmark = pytest.mark.skipif(batchnorm._library() is None, reason="there is no C compiler here")


def tensors(n=3, channels=80, size=(7, 5), dtype=torch.float64, far=0.0):
    torch.manual_seed(0)
    pictures = [(torch.randn(n, channels, *size, dtype=dtype) + far).contiguous(memory_format=LAST) for _ in range(2)]
    x, more = (p.requires_grad_() for p in pictures)
    return x, torch.rand(channels, dtype=dtype).requires_grad_(), torch.randn(channels, dtype=dtype).requires_grad_(), more


def both(given, more, relu, affine=True, threads=1):
    """[(output, gradients, averages)] of the operator and of torch."""
    x, weight, bias, other = given
    found = []
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for ours in (True, False):
            averages = torch.zeros_like(weight), torch.ones_like(weight)
            scale = (weight, bias) if affine else (None, None)
            if ours:
                y = batch_norm(x, *scale, averages, 0.1, 1e-5, other if more else None, relu)
                assert type(y.grad_fn).__name__ == "_BatchNormBackward"
            else:
                y = F.batch_norm(x, *averages, *scale, True, 0.1, 1e-5)
                y = y + other if more else y
                y = F.relu(y) if relu else y
            torch.manual_seed(1)
            wanted = [x, *(scale if affine else ()), *([other] if more else [])]
            gradients = torch.autograd.grad(y, wanted, torch.randn(y.shape, dtype=torch.float64).to(y.dtype))
            found.append([y.detach(), *gradients, *(a.detach() for a in averages)])
    finally:
        torch.set_num_threads(before)
    return found


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("more, relu, affine", [(False, True, False), (True, True, True), (True, False, True)])
def test_equals_torch(more, relu, affine, threads):
    ours, theirs = both(tensors(), more, relu, affine, threads)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)


def test_single_precision_loses_nothing_far_from_zero():
    exact = tensors(n=8, channels=16, size=(16, 16), far=1000.0)
    single = tuple(t.detach().float().contiguous(memory_format=LAST if t.dim() == 4 else torch.contiguous_format) for t in exact)
    exact = tuple(t.double().requires_grad_() for t in single)
    ours, _ = both(tuple(t.requires_grad_() for t in single), True, False)
    _, truth = both(exact, True, False)
    for a, b in zip(ours, truth, strict=True):
        assert float((a.double() - b).abs().max()) < 2e-4 * float(b.abs().max())


def test_nan_comes_through_relu():
    x, weight, bias, _ = tensors()
    with torch.no_grad():
        bias[3] = float("nan")
    y = batch_norm(x, weight, bias, (None, None), 0.0, 1e-5, relu=True)
    assert bool(y[:, 3].isnan().all())
    assert not bool(y[:, 4].isnan().any())


def test_gradients_of_gradients():
    x, weight, bias, more = tensors(n=2, channels=16, size=(3, 2))

    def penalty(operator):
        first = torch.autograd.grad(operator().square().sum(), (x, weight, more), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), (x, weight, bias))

    ours = penalty(lambda: batch_norm(x, weight, bias, (None, None), 0.0, 1e-5, more, True))
    theirs = penalty(lambda: F.relu(F.batch_norm(x, None, None, weight, bias, True, 0.0, 1e-5) + more))
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-9)
    shared = batch_norm(x, weight, bias, (None, None), 0.0, 1e-5, add_up=lambda values: values)
    with pytest.raises(RuntimeError, match="write batchnorm=local in the plan"):
        torch.autograd.grad(shared.sum(), x, create_graph=True)


def test_what_does_not_fit_is_seen():
    x, weight, *_ = tensors()
    assert fits(x, weight)
    for case in (x.detach().contiguous(), x[:0], x[:, :7], x.half(), torch.zeros(4, 80, dtype=torch.float64)):
        assert not fits(case)
    assert not fits(x, weight.float())
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        batch_norm(x[:1, :, :1, :1].contiguous(memory_format=LAST), weight, None, (None, None), 0.0, 1e-5)
    assert isinstance(nn.BatchNorm2d(80).double()(x), torch.Tensor)
