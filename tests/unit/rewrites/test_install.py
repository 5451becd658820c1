"""Rewritten models give what their authors' code gives; what cannot be traced safely is left alone."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from rewriting import same
from torch import nn
from torch.nn import functional as F

from shoal.errors import PlanError
from shoal.rewrites import registry
from shoal.rewrites.install import install

LAST = torch.channels_last


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def pictures(layout: torch.memory_format = LAST) -> torch.Tensor:
    return torch.randn(6, 3, 12, 12, dtype=torch.float64).contiguous(memory_format=layout)


class Net(nn.Module):
    """Convolution, something, Flatten in the spelling that is asked for, linear."""

    def __init__(self, middle: Callable[[Any, torch.Tensor], torch.Tensor], flatten: Callable[..., Any]) -> None:
        super().__init__()
        self.conv, self.pool, self.relu = nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.ReLU(inplace=True)
        self.act: nn.Module = nn.LeakyReLU()
        self.linear = nn.Linear(4 * 5 * 5, 7)
        self.middle, self.flatten = middle, flatten

    def forward(self, x: torch.Tensor, scale: float = 1.0, mask: torch.Tensor | None = None) -> torch.Tensor:
        x = self.linear(self.flatten(self.middle(self, self.conv(x)))) * scale
        return x if mask is None else x * mask


FLAT = {
    "flatten": lambda x: torch.flatten(x, 1),
    "method": lambda x: x.flatten(start_dim=1),
    "view": lambda x: x.contiguous().view(x.size(0), -1),
    "reshape": lambda x: x.reshape(x.shape[0], -1),
}
MIDDLE: dict[str, Callable[[Any, torch.Tensor], torch.Tensor]] = {
    "modules": lambda net, x: net.pool(net.relu(x)),
    "functions": lambda net, x: F.max_pool2d(F.relu(x), 2),
    "leaky": lambda net, x: F.max_pool2d(net.act(x), (2, 2)),
    "padded": lambda net, x: F.max_pool2d(x.relu(), 3, stride=2, padding=1, dilation=1),
}


@pytest.mark.parametrize("middle", MIDDLE)
@pytest.mark.parametrize("flat", FLAT)
def test_every_spelling_is_found_and_gives_the_same(middle: str, flat: str) -> None:
    if middle == "padded" and flat != "flatten":
        pytest.skip("once is enough")
    torch.manual_seed(0)
    found = same(Net(MIDDLE[middle], FLAT[flat]), pictures())
    assert found["relu_pool"] == 1
    assert found.get("flatten", 0) == (flat != "view")


@pytest.mark.parametrize("middle", MIDDLE)
def test_a_small_convolution_takes_its_pool_along(middle: str) -> None:
    model = Net(MIDDLE[middle], FLAT["flatten"])
    model.conv, model.linear = nn.Conv2d(3, 16, 3), nn.Linear(16 * 25, 7)
    found = same(model, pictures(), names=("conv_pool", "flatten"))
    assert found == ({"conv_pool": 1, "flatten": 1} if middle in ("modules", "functions") else {"flatten": 1})


@pytest.mark.parametrize("frozen", [False, True])
def test_batchnorm_is_folded_where_nothing_is_trained(frozen: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect", bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 4, 3, groups=2), nn.BatchNorm2d(4, affine=False), nn.Flatten(), nn.Linear(400, 5), nn.BatchNorm1d(5),
    ).double()  # fmt: skip
    x = pictures()
    model(x)
    model.eval()
    with torch.no_grad():
        expected = model(x)
        installed = install(model, ("fold_batchnorm", "flatten"), frozen)
        for _ in range(2):
            torch.testing.assert_close(model(x), expected, rtol=1e-9, atol=1e-12)
        assert installed.applied.places["fold_batchnorm"] == 3
        model[1].running_mean.add_(1.0)
        assert torch.allclose(model(x), expected) == frozen
    model.train()
    torch.testing.assert_close(model(x), copy.deepcopy(model)(x))


def test_a_call_with_other_arguments_is_traced_for_itself() -> None:
    model = Net(MIDDLE["modules"], FLAT["flatten"])
    assert same(model, pictures(torch.contiguous_format), 2.0)["flatten"] == 1
    assert same(model, pictures(), mask=torch.rand(7, dtype=torch.float64))["relu_pool"] == 1


def test_what_must_not_be_changed_is_not() -> None:
    twice = Net(lambda net, x: net.pool(h := F.relu(x)) + F.avg_pool2d(h, 2), FLAT["flatten"])
    assert "relu_pool" not in same(twice, pictures())
    in_place = Net(lambda net, x: net.pool(net.relu(x)) + F.avg_pool2d(x, 2), FLAT["flatten"])
    assert "relu_pool" not in same(in_place, pictures())
    indices = Net(lambda net, x: F.max_pool2d(F.relu(x), 2, return_indices=True)[0], FLAT["flatten"])
    assert "relu_pool" not in same(indices, pictures())
    hooked = Net(MIDDLE["modules"], FLAT["flatten"])
    seen: list[float] = []
    hooked.relu.register_forward_hook(lambda _m, _i, out: seen.append(float(out.detach().min())))
    assert "relu_pool" not in same(hooked, pictures())
    assert len(seen) == 4
    assert min(seen) == 0.0
    adaptive = nn.Sequential(nn.Conv2d(3, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))
    same(adaptive, pictures())


class Branches(nn.Module):
    """Its parts can be traced, it cannot: a branch on values."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(100, 3))
        self.other = nn.ModuleList([nn.Linear(3, 3)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.body(x)
        return y if y.sum() > 1e9 else self.other[0](y)


def test_what_cannot_be_traced_is_left_and_its_parts_are_tried() -> None:
    assert same(Branches(), pictures()) == {"relu_pool": 1, "flatten": 1}


class Counts(nn.Module):
    """Does something in Python at each call that a graph would do once."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what, self.calls, self.late = what, 0, False
        self.body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(100, 3))
        self.register_buffer("seen", torch.zeros((), dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.body(x)
        if self.what == "counter":
            self.calls += 1
        if self.what == "constant":
            x = x + torch.tensor([1.0, 2.0, 3.0], dtype=torch.float64)
        if self.what == "random":
            x = x * torch.rand(3, dtype=torch.float64)
        if self.what == "buffer":
            self.seen += 1
        if self.what == "in place":
            self.seen.add_(x.detach().sum())
        return x * 2 if self.late else x


@pytest.mark.parametrize("what", ["counter", "constant", "random", "buffer", "in place"])
def test_what_python_does_beside_is_done_at_each_call(what: str) -> None:
    model = Counts(what)
    keys = set(vars(model))
    same(model, pictures())
    assert set(vars(model)) == keys
    assert model.calls == (3 if what == "counter" else 0)


def test_a_branch_on_an_attribute_is_looked_at_anew() -> None:
    model = Counts("nothing").double()
    x = pictures()
    installed = install(model, ("relu_pool",))
    before = model(x)
    assert installed.applied.places == {"relu_pool": 1}
    model.late = True
    torch.testing.assert_close(model(x), before * 2)


def test_shared_layers_parametrizations_and_quantized_parts_go_unharmed() -> None:
    layer = nn.Linear(12, 12)
    same(nn.Sequential(layer, nn.ReLU(), layer, nn.ReLU()), torch.randn(5, 12, dtype=torch.float64))
    weighted = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(100, 3))
    nn.utils.parametrizations.weight_norm(weighted[4])
    assert same(weighted, pictures()) == {"relu_pool": 1}
    quantized = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), {nn.Linear})
    x = torch.randn(3, 4)
    expected = quantized(x)
    install(quantized, tuple(registry.all_rewrites()))
    torch.testing.assert_close(quantized(x), expected)


def test_copies_and_pickles_are_the_authors() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(100, 3)).double()
    x = pictures()
    install(model, ("relu_pool", "flatten"))
    expected = model(x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            other[4].bias.add_(1)
        torch.testing.assert_close(other(x), expected + 1)
    torch.testing.assert_close(model(x), expected)


def test_a_copied_head_has_weights_of_its_own() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 512))
    install(model, ("word_loss",))
    x = torch.randn(3, 8)
    expected = model(x) * 1.0
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            other[1].bias.add_(1)
        torch.testing.assert_close(other(x) * 1.0, expected + 1)


def test_hooks_that_come_later_are_called_and_weights_may_be_exchanged() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(400, 3)
    ).double()
    x, truth = torch.randn(2, 3, 12, 12, dtype=torch.float64), copy.deepcopy(model)
    installed = install(model, ("winograd", "relu_pool", "flatten"))
    torch.testing.assert_close(model(x), truth(x))
    assert "winograd" in installed.applied.places
    others = {name: torch.randn_like(p) for name, p in model.named_parameters()}
    found = torch.func.functional_call(model, others, (x,))
    torch.testing.assert_close(found, torch.func.functional_call(truth, others, (x,)))
    seen: list[nn.Module] = []
    with torch.no_grad():
        handle = model[1].register_forward_hook(lambda module, *_: seen.append(module))
        torch.testing.assert_close(model(x), truth(x))
        handle.remove()
        model(x)
        assert seen == [model[1]]
        vars(model[1])["forward"] = vars(truth[1])["forward"] = torch.neg
        torch.testing.assert_close(model(x), truth(x))


def test_names_are_known_or_refused() -> None:
    assert registry.in_order(("flatten", "relu_pool")) == ("relu_pool", "flatten")
    with pytest.raises(PlanError, match='There is no rewrite "flaten". Did you mean "flatten"'):
        registry.check_names(("flaten",))
    for name in registry.all_rewrites():
        assert len(registry.describe(name)) > 20
