"""Cross-entropies over a large vocabulary, in pieces: torch's values and gradients, and the output for whoever asks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from shoal.rewrites import word_loss
from shoal.rewrites.install import Installed, install

WORDS, WIDTH = 600, 12


class Language(nn.Module):
    """Tied words, a wide layer that is no score, and a head."""

    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.words = nn.Embedding(WORDS, WIDTH)
        self.wide, self.narrow = nn.Linear(WIDTH, 640), nn.Linear(640, WIDTH)
        self.head = nn.Linear(WIDTH, WORDS, bias=bias)
        self.head.weight = self.words.weight

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        x = self.words(words)
        return self.head(x + self.narrow(self.wide(x).relu()))


def shifted(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(output[:, :-1].reshape(-1, WORDS), target[:, 1:].reshape(-1))


LOSSES: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "sum": lambda o, t: F.cross_entropy(o.flatten(0, 1), t.flatten(), reduction="sum"),
    "mean": lambda o, t: F.cross_entropy(o.view(-1, WORDS), t.clamp(min=3).view(-1), ignore_index=3),
    "module": lambda o, t: nn.CrossEntropyLoss()(o.float().reshape(-1, o.size(-1)), t.reshape(-1)) * 2,
    "size": lambda o, t: F.cross_entropy(o.contiguous().view(o.shape[0] * o.shape[1], o.shape[-1]), t.flatten()),
    "smoothed": lambda o, t: F.cross_entropy(o.flatten(0, 1), t.flatten(), label_smoothing=0.1),
    "transposed": lambda o, t: F.cross_entropy(o.transpose(1, 2), t),
    "shifted": shifted,
    "other": lambda o, t: (o.softmax(-1) * torch.ones_like(o)).square().sum() + o.gather(-1, t.clamp(min=0)[..., None]).sum(),
}


def gradients(model: nn.Module, loss: Callable[..., torch.Tensor], ask: bool) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(0, WORDS, (7, 9), generator=generator)
    target = torch.where(torch.rand(7, 9, generator=generator) < 0.4, -100, words)
    model.zero_grad()
    output = model(words)
    found = loss(output, target)
    best = [output.detach().argmax(-1).double()] if ask else []
    found.backward()
    return [found.detach(), *best, *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("bias", [False, True])
def test_equals_torch(name: str, bias: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(word_loss, "_PIECE_BYTES", 1)
    torch.manual_seed(1)
    model = Language(bias)
    if name != "module":
        model.double()
    expected = gradients(model, LOSSES[name], ask=bias)
    installed = install(model, ("word_loss",))
    for _ in range(2):
        tolerance = 1e-5 if name == "module" else 1e-10
        for a, b in zip(expected, gradients(model, LOSSES[name], ask=bias), strict=True):
            torch.testing.assert_close(b, a, rtol=tolerance, atol=tolerance)
    assert installed.applied.places == ({"word_loss": 1} if name in ("sum", "mean", "module", "size") else {})
    assert_left_alone_where_useless(installed, model)


def assert_left_alone_where_useless(installed: Installed, model: Language) -> None:
    output = model.wide(torch.zeros(2, WIDTH, dtype=model.wide.weight.dtype))
    assert type(output) is torch.Tensor
    model.eval()
    assert type(model(torch.zeros(2, 3, dtype=torch.int64))) is torch.Tensor
    installed.remove()
    assert all("forward" not in vars(module) for module in model.modules())


def test_all_ignored_and_twice_differentiated() -> None:
    torch.manual_seed(1)
    model = Language(True).double()

    def penalty() -> torch.Tensor:
        output = model(torch.arange(6).view(2, 3))
        loss = F.cross_entropy(output.flatten(0, 1), torch.zeros(6, dtype=torch.int64))
        (first,) = torch.autograd.grad(loss, model.head.weight, create_graph=True)
        return torch.autograd.grad(first.square().sum(), model.head.weight)[0]

    expected = penalty()
    install(model, ("word_loss",))
    torch.testing.assert_close(penalty(), expected)
    output = model(torch.zeros(2, 3, dtype=torch.int64))
    assert F.cross_entropy(output.flatten(0, 1), torch.full((6,), -100), reduction="sum").item() == 0
