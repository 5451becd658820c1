"""Jobs over models of all kinds, written as people write them: nothing in them knows of shoal's axes.

``job(name, dtype)`` gives the odd network, a GPT with a tied head, a vision transformer of timm's, a ResNet with BatchNorm, a
Hugging Face Llama that computes its own loss, a recommender, and padded text whose loss is (sum, weight).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import timm_models
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset

import shoal

SAMPLES, BATCH = 203, 20
"""The last batch of an epoch has 3 samples."""
VOCABULARY, LENGTH = 32, 8


# -- models ----------------------------------------------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).split(width, dim=2)
        q, k, v = (y.view(rows, length, self.heads, width // self.heads).transpose(1, 2) for y in (q, k, v))
        scores = q @ k.transpose(-2, -1) / math.sqrt(width // self.heads)
        causal = torch.tril(torch.ones(length, length, dtype=torch.bool))
        mixed = scores.masked_fill(~causal, float("-inf")).softmax(-1) @ v
        x = x + self.dropout(self.out(mixed.transpose(1, 2).contiguous().view(rows, length, width)))
        return x + self.dropout(self.mlp(self.norm2(x)))


class Gpt(nn.Module):
    """The head is tied to the embedding."""

    def __init__(self, heads: int = 4, depth: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        width = 24
        self.words, self.places = nn.Embedding(VOCABULARY, width), nn.Embedding(LENGTH, width)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.words.weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.words(ids) + self.places(torch.arange(ids.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class Residual(nn.Module):
    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(inner, outer, 3, stride, 1, bias=False), nn.BatchNorm2d(outer)
        self.conv2, self.norm2 = nn.Conv2d(outer, outer, 3, 1, 1, bias=False), nn.BatchNorm2d(outer)
        self.shortcut = nn.Identity() if inner == outer else nn.Conv2d(inner, outer, 1, stride, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = F.relu(self.norm1(self.conv1(x)))
        return F.relu(self.norm2(self.conv2(y)) + self.shortcut(x))


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, 1, 1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.layers = nn.Sequential(Residual(8, 8, 1), Residual(8, 16, 2), Residual(16, 16, 1))
        self.head = nn.Linear(16, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.layers(self.stem(x)).mean((2, 3)))


class Recommender(nn.Module):
    """A table of embeddings for each column, and a network over all of them; a wide part beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.tables = nn.ModuleList(nn.Embedding(rows, 8) for rows in (64, 100, 17))
        self.wide = nn.Embedding(64, 1)
        self.deep = nn.Sequential(nn.Linear(3 * 8 + 5, 32), nn.ReLU(), nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 1))

    def forward(self, columns: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        found = [table(columns[:, k]) for k, table in enumerate(self.tables)]
        return (self.deep(torch.cat([*found, numbers], 1)) + self.wide(columns[:, 0]))[:, 0]


def odd() -> nn.Module:
    """37, 101, 64 and ten classes."""
    return nn.Sequential(nn.Linear(37, 101), nn.ReLU(), nn.Linear(101, 64), nn.ReLU(), nn.Linear(64, 10))


def vision_transformer() -> Any:
    return timm_models.create(
        "vit_tiny_patch16_224", img_size=16, patch_size=4, embed_dim=24, depth=4, num_heads=4, num_classes=10
    )


def llama() -> Any:
    """SmolLM2's shape (grouped heads, tied embeddings), much reduced; it computes its own loss from labels."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=24, intermediate_size=64, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    return LlamaForCausalLM(config)


# -- data ------------------------------------------------------------------------------------------------------------


def _generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def text(samples: int = SAMPLES) -> tuple[torch.Tensor, torch.Tensor]:
    ids = torch.randint(1, VOCABULARY, (samples, LENGTH), generator=_generator())
    return ids, (ids * 3 + ids.roll(1, 1)) % VOCABULARY


def padded_text() -> tuple[torch.Tensor, torch.Tensor]:
    """Sentences of 1 to LENGTH words; what is beyond has the label -100."""
    ids, targets = text()
    beyond = torch.arange(LENGTH) >= torch.randint(1, LENGTH + 1, (SAMPLES, 1), generator=_generator())
    return ids.masked_fill(beyond, 0), targets.masked_fill(beyond, -100)


def rows(dtype: torch.dtype, width: int = 37) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(SAMPLES, width, generator=_generator(), dtype=dtype)
    return x, x[:, :10].argmax(1)


def pictures(dtype: torch.dtype, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(SAMPLES, 3, size, size, generator=_generator(), dtype=dtype)
    return x, x.flatten(1)[:, :10].argmax(1)


def clicks(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    columns = torch.stack([torch.randint(0, n, (SAMPLES,), generator=_generator()) for n in (64, 100, 17)], 1)
    numbers = torch.randn(SAMPLES, 5, generator=_generator(), dtype=dtype)
    return columns, numbers, ((columns[:, 0] + columns[:, 1]) % 2).to(dtype)


class Labelled(Dataset):
    """Text as Hugging Face's models take it; some labels are -100."""

    def __init__(self) -> None:
        self.ids, self.labels = padded_text()

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> Mapping[str, torch.Tensor]:
        ids, labels = self.ids[index], self.labels[index]
        # The model shifts labels by itself; one of the second word keeps every sample from weighing nothing.
        return {"input_ids": ids, "labels": torch.where(torch.arange(LENGTH) < 2, self.ids[index], labels)}


# -- jobs ------------------------------------------------------------------------------------------------------------


def word_loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.cross_entropy(output.flatten(0, 1), target.flatten())


def summed_word_loss(output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    total = F.cross_entropy(output.flatten(0, 1), target.flatten(), ignore_index=-100, reduction="sum")
    return total, (target != -100).sum()


def accuracy(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output.argmax(-1) == target).double().mean()


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.05, momentum=0.9)


def adam(params: Any) -> torch.optim.Optimizer:
    return torch.optim.Adam(params, lr=3e-3)


def half_a_click(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return F.binary_cross_entropy_with_logits(output, target)


NAMES = ("odd", "gpt", "vit", "resnet", "llama", "clicks", "padded")


def job(name: str, dtype: torch.dtype = torch.float64, **changes: Any) -> shoal.Job:
    """One of NAMES: in float64 with Adam, in float32 with SGD and momentum."""
    models: dict[str, Callable[[], nn.Module]] = {
        "odd": odd, "gpt": Gpt, "vit": vision_transformer, "resnet": ResNet, "llama": llama, "clicks": Recommender,
        "padded": Gpt,
    }  # fmt: skip
    data: dict[str, Callable[[], Any]] = {
        "odd": lambda: rows(dtype), "gpt": text, "vit": lambda: pictures(dtype, 16),
        "resnet": lambda: pictures(dtype, 8), "llama": Labelled, "clicks": lambda: clicks(dtype), "padded": padded_text,
    }  # fmt: skip
    losses: dict[str, Any] = {"gpt": word_loss, "llama": None, "clicks": half_a_click, "padded": summed_word_loss}
    settings: dict[str, Any] = {
        "model": lambda: models[name]().to(dtype), "train_data": data[name], "eval_data": data[name],
        "loss": losses.get(name, F.cross_entropy), "optimizer": adam if dtype == torch.float64 else sgd,
        "metrics": {"accuracy": accuracy} if name in ("odd", "gpt", "vit", "resnet") else {},
        "name": name, "batch_size": BATCH, "epochs": 2,
    }  # fmt: skip
    return shoal.Job(**{**settings, **changes})
