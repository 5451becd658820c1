"""Convolution by Winograd's filtering: torch's values and gradients, whatever the sizes, layouts and ways to compute it."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import pytest
import torch
from torch.nn import functional as F

from shoal.kernels import winograd
from shoal.kernels.winograd import Prepared, conv3x3, fits

LAST = torch.channels_last


def expected(x, weight, bias=None):
    return F.conv2d(x, weight, bias, padding=1)


def tensors(n=2, channels=16, outputs=32, size=(8, 8), dtype=torch.float64, layout=LAST):
    torch.manual_seed(0)
    x = torch.randn(n, channels, *size, dtype=dtype).contiguous(memory_format=LAST)
    weight = torch.randn(outputs, channels, 3, 3, dtype=dtype).contiguous(memory_format=layout)
    return x.requires_grad_(), weight.requires_grad_(), torch.randn(outputs, dtype=dtype, requires_grad=True)


@pytest.fixture(params=["c", "torch"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """Both ways of computing it; the second is what a machine without a compiler does."""
    winograd._library.cache_clear()
    if request.param == "torch":
        monkeypatch.setenv("SHOAL_NATIVE", "0")
    elif winograd._library() is None:
        pytest.skip("there is no C compiler here")
    yield request.param
    winograd._library.cache_clear()


SIZES = [
    {},
    {"n": 1, "channels": 48, "outputs": 16, "size": (1, 1)},
    {"n": 3, "channels": 64, "outputs": 80, "size": (13, 5)},
    # Several blocks of tiles, the last one smaller; outputs that are no whole panels.
    {"n": 5, "channels": 32, "outputs": 208, "size": (22, 30)},
    # Few tiles and many channels: weights are transformed in parts where they are used.
    {"n": 2, "channels": 176, "outputs": 144, "size": (4, 7), "layout": torch.contiguous_format},
]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("sizes", SIZES)
def test_equals_torch(way, sizes, threads):
    given = tensors(**sizes)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found, wanted = conv3x3(*given), expected(*given)
        assert (type(found.grad_fn).__name__ == "_WinogradBackward") == (way == "c")
        upstream = torch.randn_like(wanted)
        ours, theirs = torch.autograd.grad(found, given, upstream), torch.autograd.grad(wanted, given, upstream)
    finally:
        torch.set_num_threads(before)
    assert found.is_contiguous(memory_format=LAST)
    for a, b in zip((found, *ours), (wanted, *theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12 * float(b.detach().abs().max()))


def test_rounding_in_single_precision_is_of_the_direct_kind(way):
    exact, single = tensors(n=4, channels=128, outputs=128), tensors(n=4, channels=128, outputs=128, dtype=torch.float32)
    given = [t.detach().float().requires_grad_() for t in exact]
    assert [t.stride() for t in given] == [t.stride() for t in single]
    truth, found = expected(*exact), conv3x3(*given)
    upstream = torch.randn_like(truth)
    pairs = [(found, truth), *zip(
        torch.autograd.grad(found, given, upstream.float()), torch.autograd.grad(truth, exact, upstream), strict=True
    )]  # fmt: skip
    for a, b in pairs:
        assert float((a.double() - b).detach().abs().max()) < 1e-5 * float(b.detach().abs().max())


def test_what_does_not_fit_is_left_to_torch():
    x, weight, bias = tensors(dtype=torch.float32)
    assert fits(x, weight) == (winograd._library() is not None)
    odd = torch.randn(2, 17, 8, 8).contiguous(memory_format=LAST), torch.randn(32, 17, 3, 3)
    for case in ((x.detach().contiguous(), weight), odd, (x.double(), weight), (x[:0], weight), (x, weight[:, :8])):
        assert not fits(*case)
    torch.testing.assert_close(conv3x3(*odd), expected(*odd))
    assert conv3x3(x.detach().contiguous(), weight.detach().contiguous()).is_contiguous()
    with torch.autocast("cpu", torch.bfloat16):
        assert conv3x3(x, weight, bias).dtype == torch.bfloat16


def test_gradients_that_come_in_any_layout_and_only_those_wanted(way):
    x, weight, _ = tensors()
    one = torch.ones(2, 32, 1, 1, dtype=torch.float64)
    for upstream in (torch.randn(2, 32, 8, 8, dtype=torch.float64), one.expand(-1, -1, 8, 8)):
        for wanted in ((x,), (weight,)):
            found = torch.autograd.grad(conv3x3(x, weight), wanted, upstream)
            torch.testing.assert_close(found, torch.autograd.grad(expected(x, weight), wanted, upstream), rtol=1e-10, atol=1e-10)


def test_gradients_of_gradients(way):
    x, weight, bias = tensors(size=(5, 4))

    def penalty(operator):
        # The input comes from the weight, too.
        given = x * weight.mean()
        first = torch.autograd.grad(operator(given, weight, bias).square().sum(), (x, weight), create_graph=True)
        return torch.autograd.grad(sum(g.square().sum() for g in first), (weight, bias))

    torch.testing.assert_close(penalty(conv3x3), penalty(expected), rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_prepared_weights_serve_any_batch_and_type(way):
    convolve = Prepared()
    for n, dtype in ((1, torch.float32), (60, torch.float32), (60, torch.float64), (3, torch.float32)):
        x, weight, bias = tensors(n=n, dtype=dtype)
        found, wanted = convolve(x, weight, bias), expected(x, weight, bias)
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-5 * float(wanted.abs().max()))


def test_prepared_weights_let_a_model_differentiate_its_answer(way):
    x, weight, bias = tensors(n=60)
    found, wanted = (torch.autograd.grad(f(x, weight, bias).sin().sum(), x)[0] for f in (Prepared(), expected))
    torch.testing.assert_close(found, wanted)


def test_per_sample_gradients_are_torchs(way):
    x, weight, _ = (t.detach() for t in tensors(n=3))

    def of(convolve):
        one = torch.func.grad(lambda weight, x: convolve(x[None], weight).square().sum())
        return torch.func.vmap(one, (None, 0))(weight, x)

    torch.testing.assert_close(of(conv3x3), of(expected))


def test_a_forked_process_computes_with_threads_of_its_own(way):
    if way == "torch":
        pytest.skip("torch's own threads are not ours")
    x, weight, bias = (t.detach() for t in tensors())
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        wanted = conv3x3(x, weight, bias)
        child = os.fork()
        if not child:
            # A child that waits for threads that are not there must not become a second run of the tests.
            signal.signal(signal.SIGALRM, signal.SIG_DFL)
            signal.alarm(30)
            try:
                os._exit(0 if torch.equal(conv3x3(x, weight, bias), wanted) else 1)
            finally:
                os._exit(2)
        assert os.waitpid(child, 0)[1] == 0
    finally:
        torch.set_num_threads(before)
