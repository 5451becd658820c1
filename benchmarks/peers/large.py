"""A transformer of 100 million parameters with Adam and a tiny batch: memory is weights and what goes with them.

Both sides of the memory benchmark train it: ``shoal train benchmarks/peers/large.py:large``, and the DDP peer.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from shoal.job import Job

LENGTH = 16


class Model(nn.Module):
    """Word numbers (N, T) -> logits (N, T, vocabulary); the output weights are the embedding's."""

    def __init__(self, vocabulary: int, width: int, blocks: int) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, width)
        layer = nn.TransformerEncoderLayer(
            width, width // 64, 4 * width, dropout=0.0, batch_first=True, norm_first=True
        )
        self.blocks = nn.TransformerEncoder(layer, blocks, enable_nested_tensor=False)
        nn.init.normal_(self.words.weight, std=0.02)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(words.shape[1])
        return F.linear(self.blocks(self.words(words), mask, is_causal=True), self.words.weight)


def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy over all words."""
    return F.cross_entropy(output.flatten(0, 1), target.flatten())


def _job(name: str, vocabulary: int, width: int, blocks: int) -> Job:
    def data() -> tuple[torch.Tensor, torch.Tensor]:
        words = torch.randint(vocabulary, (4096, LENGTH + 1), generator=torch.Generator().manual_seed(1))
        return words[:, :-1].clone(), words[:, 1:].clone()

    return Job(
        name=name,
        model=lambda: Model(vocabulary, width, blocks),
        train_data=data,
        loss=loss,
        optimizer=lambda params: torch.optim.Adam(params, lr=1e-4),
        batch_size=4,
        epochs=1,
    )


def large() -> Job:
    """Return the job with 100.4 million parameters."""
    return _job("large", 20_000, 768, 12)


def small() -> Job:
    """Return the same with 2 million, to see that everything runs."""
    return _job("small", 2_000, 192, 4)
