"""The models that are served in benchmarks/serve.py, for servers that know nothing of shoal: plain torch and transformers.

Run in the peers' own virtual environment, which has no shoal in it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn


class Cifar:
    """The small CNN on pictures of 3 × 32 × 32 bytes."""

    def __init__(self, weights: str) -> None:
        from safetensors.torch import load_file

        self.model = nn.Sequential(
            nn.Conv2d(3, 32, 3), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32 * 15 * 15, 10)
        ).eval()
        self.model.load_state_dict(dict(zip(self.model.state_dict(), load_file(weights).values(), strict=True)))

    def from_json(self, value: Any) -> np.ndarray:
        return np.asarray(value, np.float32).reshape(3, 32, 32)

    def from_bytes(self, raw: bytes) -> np.ndarray:
        return np.frombuffer(raw, np.float32).reshape(3, 32, 32)

    def __call__(self, inputs: Sequence[np.ndarray]) -> list[list[float]]:
        with torch.inference_mode():
            found: list[list[float]] = self.model(torch.from_numpy(np.stack(inputs))).tolist()
        return found


class MiniLM:
    """Sentences to vectors: all-MiniLM-L6-v2 with mean pooling, normalized."""

    def __init__(self, folder: str) -> None:
        from transformers import AutoModel, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.model = AutoModel.from_pretrained(folder, local_files_only=True).eval()

    def from_json(self, value: Any) -> str:
        return str(value)

    def __call__(self, inputs: Sequence[str]) -> list[list[float]]:
        batch = self.tokenizer(list(inputs), padding=True, truncation=True, max_length=256, return_tensors="pt")
        with torch.inference_mode():
            hidden = self.model(**batch).last_hidden_state
            mask = batch["attention_mask"].unsqueeze(-1).float()
            pooled = (hidden * mask).sum(1) / mask.sum(1).clamp(min=1e-9)
            found: list[list[float]] = nn.functional.normalize(pooled, dim=1).tolist()
        return found


def make() -> Cifar | MiniLM:
    """The model that the environment names: ``SERVED_MODEL``, ``SERVED_PATH``, on ``SERVED_THREADS`` threads."""
    torch.set_num_threads(int(os.environ["SERVED_THREADS"]))
    return {"cifar": Cifar, "minilm": MiniLM}[os.environ["SERVED_MODEL"]](os.environ["SERVED_PATH"])
