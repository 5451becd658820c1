"""The fused convolution and pooling: torch's values and gradients, whatever the sizes, the strides and the way it is computed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from shoal.kernels import conv_pool
from shoal.kernels.conv_pool import conv_relu_pool, fits


def expected(x, weight, bias, padding=(0, 0), relu=True, window=2):
    given = nn.functional.conv2d(x, weight, bias, padding=padding)
    given = given.relu() if relu else given
    return nn.functional.max_pool2d(given, window) if window > 1 else given


def tensors(n=3, channels=3, outputs=32, size=(10, 11), kernel=(3, 3), seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    return (
        torch.randn(n, channels, *size, dtype=dtype, requires_grad=True),
        torch.randn(outputs, channels, *kernel, dtype=dtype, requires_grad=True),
        torch.randn(outputs, dtype=dtype, requires_grad=True),
    )


@pytest.fixture(params=["c", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Both ways of computing it; the second is what a machine without a compiler does."""
    conv_pool._library.cache_clear()
    if request.param == "torch":
        monkeypatch.setenv("SHOAL_NATIVE", "0")
    elif conv_pool._library() is None:
        pytest.skip("there is no C compiler here")
    yield request.param
    conv_pool._library.cache_clear()


@pytest.mark.parametrize(
    "sizes, how",
    [
        ({}, {}),
        ({"channels": 1, "outputs": 16, "kernel": (5, 4)}, {"padding": (2, 1)}),
        ({"channels": 4, "outputs": 48, "size": (7, 7)}, {"relu": False}),
        ({"outputs": 64, "kernel": (1, 1)}, {"window": 1}),
        ({"outputs": 37}, {}),
    ],
)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_equals_torch(way, sizes, how, layout):
    x, weight, bias = tensors(**sizes)
    x = x.detach().contiguous(memory_format=layout).requires_grad_()
    found, wanted = conv_relu_pool(x, weight, bias, **how), expected(x, weight, bias, **how)
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    given = torch.randn_like(wanted)
    for a, b in zip(
        torch.autograd.grad(found, (x, weight, bias), given), torch.autograd.grad(wanted, (x, weight, bias), given), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_the_operator_in_c_is_what_runs(way):
    found = conv_relu_pool(*tensors())
    assert (type(found.grad_fn).__name__ == "_ConvPoolBackward") == (way == "c")
    assert fits(*tensors()[:2], window=2) == (way == "c")


def test_without_bias_and_several_threads(way):
    x, weight, _ = tensors(n=5, dtype=torch.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        found = conv_relu_pool(x, weight, None)
        gradient = torch.autograd.grad(found.sum(), weight)[0]
    finally:
        torch.set_num_threads(before)
    torch.testing.assert_close(found, expected(x, weight, None), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(gradient, torch.autograd.grad(expected(x, weight, None).sum(), weight)[0], rtol=1e-4, atol=1e-4)


def test_equal_values_give_their_gradient_to_the_first(way):
    x, weight, bias = tensors()
    with torch.no_grad():
        # All positions of a window alike, some of them where ReLU shuts.
        x[:, :, :, :5] = 1.0
    found, wanted = conv_relu_pool(x, weight, bias), expected(x, weight, bias)
    given = torch.randn_like(wanted)
    for a, b in zip(
        torch.autograd.grad(found, (x, weight), given), torch.autograd.grad(wanted, (x, weight), given), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_nan_comes_through(way):
    x, weight, bias = tensors()
    with torch.no_grad():
        x[0, 0, 8, 8] = float("nan")
    torch.testing.assert_close(conv_relu_pool(x, weight, bias), expected(x, weight, bias), equal_nan=True)


def test_gradients_of_gradients(way):
    x, weight, bias = tensors(n=2, size=(6, 6))

    def penalty(operator):
        # The input comes from the weight, too.
        given = x * weight.mean()
        first = torch.autograd.grad(operator(given, weight, bias).square().sum(), (x, weight), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), (weight, bias))

    for a, b in zip(penalty(conv_relu_pool), penalty(expected), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_autocast_and_empty_batches_are_left_to_torch():
    x, weight, bias = tensors(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert conv_relu_pool(x, weight, bias).dtype == torch.bfloat16
    assert conv_relu_pool(x[:0], weight, bias).shape == (0, 32, 4, 4)
