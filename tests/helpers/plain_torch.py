"""The oracle of the equivalence tests: a training loop as anybody would write it, with only the order from shoal.

Also what several of these tests share: a small transformer, and the measure of how far two models are apart.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from shoal.data.order import epoch_order
from shoal.observe.compare import difference

VOCABULARY, LENGTH = 29, 8
IGNORED = -100


@dataclass(kw_only=True)
class PlainLoop:
    """One process, one batch at a time.

    Attributes:
        build: makes the model, after ``torch.manual_seed(seed)``.
        backward: (model, sample numbers) -> None: leaves the gradient of the batch's mean loss in ``.grad``.
        optimizer: (model) -> optimizer.
        after_step, after_epoch: called with (model, optimizer); ``after_epoch`` ends the training by returning True.
    """

    build: Callable[[], nn.Module]
    samples: int
    batch_size: int
    backward: Callable[[Any, torch.Tensor], None]
    optimizer: Callable[[nn.Module], torch.optim.Optimizer]
    seed: int = 0
    grad_clip: float | None = None
    after_step: Callable[[nn.Module, torch.optim.Optimizer], Any] = lambda model, optimizer: None
    after_epoch: Callable[[nn.Module, torch.optim.Optimizer], Any] = lambda model, optimizer: None

    def run(self, steps: int) -> dict[str, torch.Tensor]:
        """Train for so many steps; return the state_dict."""
        torch.manual_seed(self.seed)
        model = self.build()
        optimizer = self.optimizer(model)
        done = 0
        for epoch in itertools.count():
            order = torch.from_numpy(epoch_order(self.samples, self.seed, epoch))
            for rows in order.split(self.batch_size):
                if done == steps:
                    return model.state_dict()
                optimizer.zero_grad()
                self.backward(model, rows)
                if self.grad_clip is not None:
                    nn.utils.clip_grad_norm_(model.parameters(), self.grad_clip)
                optimizer.step()
                self.after_step(model, optimizer)
                done += 1
            if self.after_epoch(model, optimizer):
                return model.state_dict()
        raise AssertionError


def assert_equal(found: Mapping[str, Any], expected: Mapping[str, Any], within: float) -> None:
    """Fail, naming the tensor that is furthest off, unless max_rel_diff is at most ``within``."""
    off = difference(expected, found)
    assert off.max_rel_diff <= within, off


def moved(before: Mapping[str, torch.Tensor], after: Mapping[str, torch.Tensor]) -> set[str]:
    """The names of the tensors that training has changed."""
    return {name for name in before if not torch.equal(before[name], after[name])}


class TinyTransformer(nn.Module):
    """Pre-norm, causal, with the output tied to the embedding, and with a layer that nobody calls."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        width = 16
        self.words = nn.Embedding(VOCABULARY, width, dtype=dtype)
        self.positions = nn.Embedding(LENGTH, width, dtype=dtype)
        self.norm1 = nn.LayerNorm(width, dtype=dtype)
        self.qkv = nn.Linear(width, 3 * width, dtype=dtype)
        self.out = nn.Linear(width, width, dtype=dtype)
        self.norm2 = nn.LayerNorm(width, dtype=dtype)
        self.feed = nn.Sequential(
            nn.Linear(width, 2 * width, dtype=dtype), nn.GELU(), nn.Linear(2 * width, width, dtype=dtype)
        )
        self.norm = nn.LayerNorm(width, dtype=dtype)
        self.head = nn.Linear(width, VOCABULARY, bias=False, dtype=dtype)
        self.unused = nn.Linear(width, width, dtype=dtype)
        self.head.weight = self.words.weight

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        x = self.words(words) + self.positions.weight[: words.shape[1]]
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        x = x + self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return self.head(self.norm(x + self.feed(self.norm2(x))))


def text(samples: int, padded: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(words, next words), int64 of shape (samples, LENGTH); padded sentences have 1 to LENGTH words."""
    generator = torch.Generator().manual_seed(5)
    words = torch.randint(1, VOCABULARY, (samples, LENGTH), generator=generator)
    targets = (words * 3 + words.roll(1, 1)) % VOCABULARY
    if padded:
        beyond = torch.arange(LENGTH) >= torch.randint(1, LENGTH + 1, (samples, 1), generator=generator)
        words, targets = words.masked_fill(beyond, 0), targets.masked_fill(beyond, IGNORED)
    return words, targets


def mean_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """The mean over the words, which are equally many in each sample."""
    return F.cross_entropy(output.flatten(0, 1), target.flatten())


def word_loss(output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum over the words, number of words)."""
    total = F.cross_entropy(output.flatten(0, 1), target.flatten(), ignore_index=IGNORED, reduction="sum")
    return total, (target != IGNORED).sum()
