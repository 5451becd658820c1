from __future__ import annotations

import copy
import pickle
import threading
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import nn

from shoal.train.batchnorm import GlobalBatchNorm, statistics_bytes

# (layer, its shape behind the batch, samples of each worker)
CASES: list[tuple[Any, tuple[int, ...], tuple[int, ...]]] = [
    (lambda: nn.BatchNorm1d(3), (3,), (5, 2)),
    (lambda: nn.BatchNorm1d(3), (3, 4), (1, 3)),
    (lambda: nn.BatchNorm1d(3, affine=False), (3,), (2, 4)),
    (lambda: nn.BatchNorm2d(2, momentum=None), (2, 3, 2), (3, 1)),
    (lambda: nn.BatchNorm2d(2, track_running_stats=False), (2, 3, 2), (2, 2)),
    (lambda: nn.BatchNorm3d(2, momentum=0.3, eps=1e-3), (2, 2, 3, 2), (1, 2)),
    # By the operator in C.
    (lambda: nn.BatchNorm2d(48, momentum=0.3), (48, 7, 6), (1, 2)),
    (lambda: nn.BatchNorm2d(16, affine=False), (16, 3, 2), (3, 1)),
]


class Together:
    """Adds up what two threads give, in rank order, as the arena does."""

    def __init__(self) -> None:
        self._barrier = threading.Barrier(2, timeout=60)
        self._given: list[torch.Tensor] = [torch.empty(0)] * 2

    def of(self, rank: int) -> Any:
        def sum_small(values: torch.Tensor, ranks: Sequence[int]) -> torch.Tensor:
            assert list(ranks) == [0, 1]
            self._given[rank] = values.clone()
            self._barrier.wait()
            total = self._given[0] + self._given[1]
            self._barrier.wait()
            return total

        return sum_small


def halves(make: Any, parts: list[torch.Tensor], slopes: list[torch.Tensor]) -> list[tuple[nn.Module, Any, Any]]:
    """Two workers with two batches each: [(module, outputs, gradients of the inputs)]."""
    together = Together()
    found: list[Any] = [None, None]

    def work(rank: int) -> None:
        module = make()
        hook = GlobalBatchNorm(together.of(rank))
        hook.take_over(nn.Sequential(module))
        hook.taking_part([0, 1])
        outputs, gradients = [], []
        for scale in (1.0, 3.0):
            x = parts[rank] * scale + scale
            x = (x.contiguous(memory_format=torch.channels_last) if x.dim() == 4 else x).requires_grad_()
            y = module(x)
            y.backward(slopes[rank])
            outputs.append(y.detach())
            gradients.append(x.grad)
        found[rank] = (module, outputs, gradients)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert all(found)
    return found


@pytest.mark.parametrize("case", range(len(CASES)))
def test_two_workers_compute_what_torch_does_on_their_batches_together(case: int) -> None:
    make_plain, shape, counts = CASES[case]
    torch.manual_seed(case)

    def make() -> nn.Module:
        module = make_plain().double()
        if module.affine:
            with torch.no_grad():
                module.weight.copy_(torch.linspace(0.5, 2, len(module.weight)))
                module.bias.copy_(torch.linspace(-1, 1, len(module.bias)))
        return module

    parts = [torch.randn(n, *shape, dtype=torch.float64) + 2 for n in counts]
    slopes = [torch.randn_like(part) for part in parts]
    found = halves(make, parts, slopes)
    plain = make()
    for at, scale in enumerate((1.0, 3.0)):
        x = (torch.cat(parts) * scale + scale).requires_grad_()
        y = plain(x)
        y.backward(torch.cat(slopes))
        assert x.grad is not None
        torch.testing.assert_close(torch.cat([f[1][at] for f in found]), y, rtol=1e-11, atol=1e-11)
        torch.testing.assert_close(torch.cat([f[2][at] for f in found]), x.grad, rtol=1e-10, atol=1e-10)
    for module, _, _ in found:
        for name, buffer in plain.named_buffers():
            torch.testing.assert_close(module.get_buffer(name), buffer, rtol=1e-12, atol=1e-12)
    for name, parameter in plain.named_parameters():
        assert parameter.grad is not None
        together = sum(f[0].get_parameter(name).grad for f in found)
        torch.testing.assert_close(together, parameter.grad, rtol=1e-11, atol=1e-11)


def _never(values: torch.Tensor, ranks: Sequence[int]) -> torch.Tensor:
    raise AssertionError("asked for a sum")


def test_alone_or_in_evaluation_the_layer_is_torchs_own() -> None:
    x = torch.randn(6, 3)
    plain, own = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    hook = GlobalBatchNorm(_never)
    hook.take_over(nn.Sequential(own))
    hook.taking_part([1])
    assert torch.equal(own(x), plain(x))
    hook.taking_part([0, 1])
    assert torch.equal(own.eval()(x), plain.eval()(x))


def test_one_value_per_channel_is_refused_as_torch_does() -> None:
    module = nn.BatchNorm1d(3)
    hook = GlobalBatchNorm(lambda values, ranks: values)
    hook.take_over(nn.Sequential(module))
    hook.taking_part([0, 1])
    with pytest.raises(ValueError, match="more than 1 value per channel"):
        module(torch.randn(1, 3))


class Activated(nn.BatchNorm1d):
    """A subclass with more to its forward than the normalisation, such as timm's."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).relu()


def test_a_subclass_keeps_the_rest_of_its_forward() -> None:
    parts = [torch.randn(n, 3, dtype=torch.float64) for n in (4, 3)]
    found = halves(lambda: Activated(3).double(), parts, [torch.ones_like(p) for p in parts])
    expected = Activated(3).double()(torch.cat(parts) + 1)
    torch.testing.assert_close(torch.cat([f[1][0] for f in found]), expected)


def test_a_copied_layer_has_weights_and_averages_of_its_own() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3))
    hook = GlobalBatchNorm(lambda values, ranks: values * 2)
    hook.take_over(model)
    x = torch.randn(5, 3)
    for ranks in ([0], [0, 1]):
        hook.taking_part(ranks)
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            with torch.no_grad():
                other[0].bias.add_(1)
            held, own = model[0].running_mean.clone(), other[0].running_mean.clone()
            found = other(x)
            assert torch.equal(model[0].running_mean, held) and not torch.equal(other[0].running_mean, own)
            torch.testing.assert_close(found, model(x) + 1)


def test_room_for_the_statistics_of_each_layer() -> None:
    assert statistics_bytes(nn.Linear(3, 3)) == 0
    assert statistics_bytes(nn.Sequential(nn.BatchNorm1d(3), nn.BatchNorm2d(5))) >= 2 * (2 * (3 + 5) * 8 + 8)
