"""A small pre-norm transformer language model on padded sentences, its loss weighted by words.

Two pre-norm blocks (Xiong et al., 2020) of width 128 with 4 heads, learned positions, and the output
weights tied to the embedding (Press and Wolf, 2017): 0.76 million parameters. The text is made by the grammar
in ``shoal/jobs/language/grammar.py``: 20,000 sentences to train on, 2,000 to evaluate, of 5 to 32 words out of a
vocabulary of 2,840, padded to 31 predicted words. The loss returns (sum, number of words), so that every word
counts the same, however the sentences fall into shares.

The text's entropy is 3.98 nats per word: no model's loss can be lower.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional as F

from shoal.job import Job
from shoal.jobs.language.grammar import LONGEST, PAD, VOCABULARY, sentences

NAME = "text-transformer"
IGNORED = -100  # the target where a sentence has ended
_WIDTH, _HEADS, _BLOCKS = 128, 4, 2


class Block(nn.Module):
    """Causal self-attention and a feed-forward network, each after its LayerNorm: (N, T, width) -> the same."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        batch, length, width = x.shape
        q, k, v = (
            part.view(batch, length, self.heads, width // self.heads).transpose(1, 2)
            for part in self.qkv(self.norm1(x)).chunk(3, dim=-1)
        )
        # Padding comes after the words, so the causal mask already hides it from them.
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.feed(self.norm2(x))


class Transformer(nn.Module):
    """A language model of so many blocks: word numbers (N, T) -> logits (N, T, vocabulary) of the words that follow."""

    def __init__(self, blocks: int = _BLOCKS) -> None:
        super().__init__()
        self.words = nn.Embedding(VOCABULARY, _WIDTH, padding_idx=PAD)
        self.positions = nn.Embedding(LONGEST, _WIDTH)
        self.blocks = nn.Sequential(*(Block(_WIDTH, _HEADS) for _ in range(blocks)))
        self.norm = nn.LayerNorm(_WIDTH)
        self.head = nn.Linear(_WIDTH, VOCABULARY, bias=False)
        nn.init.normal_(self.words.weight, std=0.02)
        nn.init.normal_(self.positions.weight, std=0.02)
        self.head.weight = self.words.weight

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        positions = torch.arange(words.shape[1], device=words.device)
        x = self.words(words) + self.positions(positions)
        return self.head(self.norm(self.blocks(x)))


def word_loss(output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (sum of the words' cross-entropies, number of words), padding left out."""
    total = F.cross_entropy(output.flatten(0, 1), target.flatten(), ignore_index=IGNORED, reduction="sum")
    return total, (target != IGNORED).sum()


def padded(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (words, next words) of ``count`` sentences, both int64 of shape (count, LONGEST − 1)."""
    words = torch.full((count, LONGEST - 1), PAD)
    targets = torch.full((count, LONGEST - 1), IGNORED)
    for row, sentence in enumerate(sentences(count, seed)[0]):
        words[row, : len(sentence) - 1] = torch.tensor(sentence[:-1])
        targets[row, : len(sentence) - 1] = torch.tensor(sentence[1:])
    return words, targets


def train_data() -> tuple[torch.Tensor, torch.Tensor]:
    """Return 20,000 sentences, the same every time."""
    return padded(20_000, seed=1)


def eval_data() -> tuple[torch.Tensor, torch.Tensor]:
    """Return 2,000 other sentences of the same grammar."""
    return padded(2_000, seed=2)


def job() -> Job:
    """Return the job ``text-transformer``."""
    return Job(
        name=NAME,
        model=Transformer,
        train_data=train_data,
        eval_data=eval_data,
        loss=word_loss,
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-3, weight_decay=0.01),
        batch_size=64,
        epochs=5,
        grad_clip=1.0,
    )
