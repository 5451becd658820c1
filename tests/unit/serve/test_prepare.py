"""Texts to rows of inputs, by a small tokenizer of its own."""

from __future__ import annotations

import asyncio
import threading
from pathlib import Path
from typing import Any

import pytest

from shoal.serve.prepare import tokens_of
from shoal.serve.protocols.embeddings import TextEncoder
from shoal.serve.signature import ModelSignature

tokenizers = pytest.importorskip("tokenizers")


def test_long_texts_hold_nobody_up_and_become_the_same_tokens(tmp_path: Path) -> None:
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel({"?": 0, "a": 1, "b": 2}, unk_token="?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    made.save(str(tmp_path / "tokenizer.json"))
    tensor = {"dtype": "INT64", "shape": [-1, -1], "longest": 4}
    signature = ModelSignature.from_description(
        "m", {"inputs": [{"name": "input", **tensor}], "outputs": [{"name": "output", "dtype": "FP32", "shape": [-1, 2]}]}
    )
    threads: list[bool] = []

    class Encoder(TextEncoder):
        def tokens(self, texts: Any) -> list[list[int]]:
            threads.append(threading.current_thread() is threading.main_thread())
            return super().tokens(texts)

    encoder = Encoder(str(tmp_path / "tokenizer.json"), signature)
    assert asyncio.run(tokens_of(encoder, ["a b", "b"])) == [[1, 2], [2]]
    assert asyncio.run(tokens_of(encoder, ["a b " * 5000, "b"])) == [[1, 2, 1, 2], [2]]
    assert threads == [True, False]
