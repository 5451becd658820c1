"""Products by oneDNN: torch's values and derivatives wherever they come from, and torch's own kernels for everything else."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from shoal.kernels.onednn import Products, available

pytestmark = pytest.mark.skipif(not available(), reason="this torch was built without oneDNN")


class Counted(Products):
    def __init__(self) -> None:
        self.times = 0
        super().__init__(self._count)

    def _count(self) -> None:
        self.times += 1


@pytest.fixture
def products() -> Iterator[Counted]:
    made = Counted()
    made.begin()
    yield made
    made.end()


def near(found: torch.Tensor, exact: torch.Tensor) -> bool:
    return float((found.double() - exact).abs().max()) <= 1e-5 * float(exact.abs().max())


@pytest.mark.parametrize("turned", [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("shape", [(100, 300, 77), (64, 2048, 256), (17, 512, 300)])
def test_products(shape: tuple[int, int, int], turned: tuple[bool, bool], products: Counted) -> None:
    rows, inner, columns = shape
    left = torch.randn(inner, rows).t() if turned[0] else torch.randn(rows, inner)
    right = torch.randn(columns, inner).t() if turned[1] else torch.randn(inner, columns)
    bias = torch.randn(columns)
    exact = left.double() @ right.double()
    assert near(left @ right, exact) and near(torch.addmm(bias, left, right), exact + bias)
    assert near(F.linear(left, right.t(), bias), exact + bias) and products.times == 3


def test_what_is_left_to_torch_has_its_bits(products: Counted) -> None:
    torch.manual_seed(0)
    whole = torch.randn(256, 256)
    cases = [
        lambda: whole.double() @ whole.double(),
        lambda: whole[:8] @ whole,
        lambda: whole[:64, :64] @ whole[:64, :64],
        lambda: torch.ones(1, 256).expand(256, 256) @ whole,
        lambda: torch.ones(256, 1).expand(256, 256) @ whole,
        lambda: torch.randn(512, 512)[::2, ::2] @ whole,
        lambda: torch.addmm(whole, whole, whole, beta=0.5),
        lambda: torch.addmm(whole[:, 0], whole, whole),
        lambda: torch.addmm(whole[0], whole, whole, alpha=2),
        lambda: whole.bfloat16() @ whole.bfloat16(),
        lambda: (1000 * whole).long() @ whole.long(),
        lambda: torch.empty(0, 256) @ whole,
    ]
    torch.manual_seed(1)
    found = [case() for case in cases]
    assert not products.times
    products.end()
    torch.manual_seed(1)
    assert all(torch.equal(a, case()) for a, case in zip(found, cases, strict=True))
    mistakes = (
        lambda: whole @ whole[:100],
        lambda: torch.mm(whole, whole[0]),
        lambda: torch.addmm(whole[0, :7], whole, whole),
        lambda: torch.addmm(whole[0], whole, whole[0]),
    )
    for wrong in mistakes:
        products.end()
        with pytest.raises(RuntimeError) as own:
            wrong()
        products.begin()
        with pytest.raises(RuntimeError) as ours:
            wrong()
        assert str(own.value) == str(ours.value)


def test_derivatives_of_a_block_and_second_ones(products: Counted) -> None:
    torch.manual_seed(0)
    block = nn.TransformerEncoderLayer(64, 4, 256, dropout=0.0, batch_first=True)
    x = torch.randn(8, 32, 64)

    def derivatives(given: torch.Tensor) -> list[torch.Tensor]:
        wanted = [given.requires_grad_(), *block.parameters()]
        with sdpa_kernel(SDPBackend.MATH):
            first = torch.autograd.grad(block(given).pow(3).sum(), wanted, create_graph=True)
        second = torch.autograd.grad(first[0].square().sum(), wanted)
        return [*(t.detach() for t in first), *second]

    found = derivatives(x.clone())
    assert products.times > 12
    block.double()
    for name, a, b in zip(2 * ["x", *dict(block.named_parameters())], found, derivatives(x.double()), strict=True):
        assert float((a.double() - b).abs().max()) <= 1e-4 * max(float(b.abs().max()), 1.0), name


def test_who_ends_last_gives_back_torchs_own() -> None:
    whole = torch.randn(256, 256)
    own = whole @ whole
    one, other = Counted(), Counted()
    one.begin()
    one.begin()
    other.begin()
    one.end()
    assert near(whole @ whole, whole.double() @ whole.double()) and (one.times, other.times) == (0, 1)
    other.end()
    other.end()
    assert torch.equal(whole @ whole, own) and (one.times, other.times) == (0, 1)
