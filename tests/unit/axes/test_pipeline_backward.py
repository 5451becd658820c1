"""A backward pass in two parts gives the gradients of one in one part, and calls the hooks of the parameters."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from shoal.axes.pipeline_backward import input_gradients


class Shared(nn.Module):
    """One layer used twice, one beside the way from the input to the output, and two outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.twice, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.shift = nn.Parameter(torch.randn(3, 4))
        self.unused = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = torch.tanh(self.twice(x)) + torch.sigmoid(self.shift).sum(0)
        z = self.twice(torch.tanh(self.other(y)))
        return y, z * y


def layer() -> nn.Module:
    return nn.TransformerEncoderLayer(4, 2, 8, dropout=0.0, batch_first=True)


@pytest.mark.parametrize("build", [Shared, layer, lambda: nn.LSTM(4, 4, 2, batch_first=True)])
@pytest.mark.parametrize("frozen", [False, True])
def test_two_parts_equal_one(build: type[nn.Module], frozen: bool) -> None:
    torch.manual_seed(0)
    model = build().double()
    if frozen:
        next(model.parameters()).requires_grad_(False)
    x = torch.randn(2, 3, 4, dtype=torch.float64)

    def outputs(of: torch.Tensor) -> list[torch.Tensor]:
        made = model(of)
        return list(made[:1] if isinstance(model, nn.LSTM) else made) if isinstance(made, tuple) else [made]

    given = [torch.randn_like(o) for o in outputs(x)]
    whole = x.clone().requires_grad_()
    torch.autograd.backward(outputs(whole), given)
    expected = {name: p.grad for name, p in model.named_parameters()}
    calls = []
    for name, parameter in model.named_parameters():
        parameter.grad = None
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda _, name=name: calls.append(name))

    leaf = x.clone().requires_grad_()
    (found,), rest = input_gradients(outputs(leaf), given, [leaf], model.parameters())
    torch.testing.assert_close(found, whole.grad, rtol=1e-12, atol=0)
    assert not calls, "no weight's gradient is computed in the first part"
    rest()
    for name, parameter in model.named_parameters():
        if expected[name] is None:
            assert parameter.grad is None
        else:
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-12, atol=1e-15)
    assert sorted(calls) == sorted(name for name, gradient in expected.items() if gradient is not None)


def test_without_inputs_all_is_left_for_later() -> None:
    weight = torch.ones(2, requires_grad=True)
    found, rest = input_gradients([(weight * 3).sum()], [None], [], [weight])
    assert found == [] and weight.grad is None
    rest()
    assert weight.grad is not None and weight.grad.tolist() == [3.0, 3.0]


def test_an_output_that_does_not_depend_on_the_input_is_computed_at_once() -> None:
    weight, leaf = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    found, rest = input_gradients([weight * 2, leaf * weight], [torch.ones(2), torch.ones(2)], [leaf], [weight])
    rest()
    assert found[0] is not None and found[0].tolist() == [1.0, 1.0]
    assert weight.grad is not None and weight.grad.tolist() == [3.0, 3.0]


def test_recomputed_layers_give_the_same() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)).double()
    x = torch.randn(3, 4, dtype=torch.float64)
    whole = x.clone().requires_grad_()
    model(whole).sum().backward()
    expected = [p.grad for p in model.parameters()]
    model.zero_grad()
    leaf = x.clone().requires_grad_()
    out = checkpoint(model, leaf, use_reentrant=False)
    (found,), rest = input_gradients([out], [torch.ones_like(out)], [leaf], model.parameters())
    rest()
    torch.testing.assert_close(found, whole.grad)
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient)
