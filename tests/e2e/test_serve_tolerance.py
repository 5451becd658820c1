"""A service whose answers may be a little off, and by how much they are."""

from __future__ import annotations

import http.client
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hubs import LONGEST, folder

import shoal

transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")


def _exact(place: Path, texts: list[str]) -> np.ndarray:
    tokenizer = tokenizers.Tokenizer.from_file(str(place / "tokenizer.json"))
    tokenizer.enable_truncation(LONGEST)
    model = transformers.BertModel.from_pretrained(place).eval()
    with torch.no_grad():
        rows = [model(torch.tensor([tokenizer.encode(text).ids])).last_hidden_state.mean(1) for text in texts]
    return torch.nn.functional.normalize(torch.cat(rows), dim=1).numpy()


def _embeddings(url: str, texts: list[str]) -> np.ndarray:
    connection = http.client.HTTPConnection(url.removeprefix("http://"), timeout=60)
    connection.request(
        "POST", "/v1/embeddings", json.dumps({"model": "tiny", "input": texts}), {"content-type": "application/json"}
    )
    answer = json.loads(connection.getresponse().read())
    connection.close()
    return np.array([row["embedding"] for row in answer["data"]])


def test_answers_are_near_in_any_company(tmp_path: Path) -> None:
    place = folder(tmp_path / "tiny")
    made = np.random.default_rng(5)
    texts = [" ".join(f"w{k}" for k in made.integers(0, 60, made.integers(1, 60))) for _ in range(24)]
    with shoal.serve(place, slo_ms=20_000, replicas=1, tolerance="cosine=0.98") as running:
        chosen = shoal.Client(running.url).metadata("tiny")["precision"]
        alone = np.concatenate([_embeddings(running.url, [text]) for text in texts])
        together = _embeddings(running.url, texts)
    assert chosen["tolerance"] == "cosine ≥ 0.98" and chosen["rows"] == "24 texts"
    assert {"bf16", "bf16 autocast"} <= {one["name"] for one in chosen["tried"]}
    taken = [one for one in chosen["tried"] if one["name"] == chosen["name"]]
    assert all(one["cosine"] >= 0.98 and not one["refused"] for one in taken)
    exact = _exact(place, texts)
    for found in (alone, together):
        assert (found * exact).sum(1).min() > 0.98
    assert (alone * together).sum(1).min() > 0.98
