"""A data set of texts: batched with others of their length, answered as each alone."""

from __future__ import annotations

import json
from pathlib import Path

import hubs
import numpy as np
import pytest
import torch

import shoal
from shoal.errors import RequestError
from shoal.serve import hugging_face


def _texts(count: int) -> list[str]:
    made = np.random.default_rng(0)
    return [" ".join(f"w{k}" for k in made.integers(0, 60, made.integers(1, 60))) for _ in range(count)]


def _tokens(folder: Path, text: str) -> torch.Tensor:
    tokenizer = hubs.tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.enable_truncation(hubs.LONGEST)
    return torch.tensor([tokenizer.encode(text).ids])


def _right(folder: Path, texts: list[str]) -> list[np.ndarray]:
    """Each text alone."""
    model = hugging_face.load(folder)
    with torch.no_grad():
        rows = [_tokens(folder, text) for text in texts]
        return [model(row, torch.ones_like(row))[0].numpy() for row in rows]


def test_texts_and_tokens_of_any_length_with_answers_as_long_as_they_are(tmp_path: Path) -> None:
    folder = hubs.folder(tmp_path / "plain", pooling=None)
    texts = [text[: 80 + k % 40] for k, text in enumerate(_texts(300))]
    with (tmp_path / "x.jsonl").open("w") as file:
        for k, text in enumerate(texts):
            file.write(json.dumps({"input_ids": _tokens(folder, text)[0].tolist()} if k % 3 else {"text": text}) + "\n")
    with pytest.raises(RequestError, match="is as long as its row; give a .jsonl"):
        shoal.predict(folder, tmp_path / "x.jsonl", tmp_path / "y.npz")
    shoal.predict(folder, tmp_path / "x.jsonl", tmp_path / "y.jsonl", replicas=2)
    lines = [json.loads(line) for line in (tmp_path / "y.jsonl").read_text().splitlines()]
    for line, expected in zip(lines, _right(folder, texts), strict=True):
        np.testing.assert_allclose(np.array(line["last_hidden_state"], "f4"), expected, rtol=0, atol=2e-6)
