"""Small Hugging Face folders to serve, of random weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{k}" for k in range(60))]
LONGEST = 40


def folder(directory: Path, pooling: str | None = "mean", labels: int = 0) -> Path:
    """A small BERT of random weights, as sentence-transformers (or transformers) would have written it."""
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64,
        max_position_embeddings=64, num_labels=labels or 2,
    )  # fmt: skip
    torch.manual_seed(3)
    kind = transformers.BertForSequenceClassification if labels else transformers.BertModel
    kind(config).save_pretrained(directory)
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({w: k for k, w in enumerate(WORDS)}, "[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("[CLS] $A [SEP]", None, [("[CLS]", 2), ("[SEP]", 3)])
    tokenizer.save(str(directory / "tokenizer.json"))
    if pooling is not None:
        parts = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
        modules = [{"path": path, "type": f"sentence_transformers.models.{part}"} for part, path in parts.items()]
        (directory / "modules.json").write_text(json.dumps(modules))
        (directory / "1_Pooling").mkdir()
        settings = {f"pooling_mode_{how}_token{'s' * (how == 'mean')}": how == pooling for how in ("mean", "cls")}
        (directory / "1_Pooling" / "config.json").write_text(json.dumps(settings))
        (directory / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": LONGEST}))
    return directory
