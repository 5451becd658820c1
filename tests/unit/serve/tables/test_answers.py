"""Answers are written so that what is read back is what the model said."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from shoal.errors import RequestError
from shoal.serve.signature import ModelSignature, TensorSignature
from shoal.serve.tables.answers import Answers, JsonLines, Labels, format_of, suffix_of
from shoal.serve.tables.rows import bfloat16_bits

SIGNATURE = ModelSignature(
    "net",
    (),
    (
        TensorSignature("grid", "FP32", (-1, 2, 2)), TensorSignature("count", "INT64", (-1,)),
        TensorSignature("half", "BF16", (-1, 2)),
    ),
)  # fmt: skip
RNG = np.random.default_rng(0)
GRID = RNG.standard_normal((5000, 2, 2)).astype("f4")
COUNT = np.arange(5000) + 2**53
HALF = bfloat16_bits(RNG.standard_normal((5000, 2)).astype("f4"))
WIDE = torch.from_numpy(HALF).view(torch.bfloat16).float().numpy()


def _written(tmp_path: Path, suffix: str) -> Path:
    form = format_of(suffix, SIGNATURE, False)
    part = tmp_path / f"a{suffix}.part"
    with part.open("wb") as file:
        file.write(form.head())
        for at in range(0, 5000, 1000):
            file.write(form.encode(Answers([array[at : at + 1000] for array in (GRID, COUNT, HALF)])))
    whole = form.assemble(part, 5000)
    return whole.rename(tmp_path / f"a{suffix}")


def test_json_lines_hold_every_bit(tmp_path: Path) -> None:
    rows = [json.loads(line) for line in _written(tmp_path, ".jsonl").read_text().splitlines()]
    assert list(rows[0]) == ["grid", "count", "half"]
    assert np.array_equal(np.array([row["grid"] for row in rows], "f4"), GRID)
    assert [row["count"] for row in rows] == COUNT.tolist()
    assert np.array_equal(np.array([row["half"] for row in rows], "f4"), WIDE)


def test_csv_holds_every_bit(tmp_path: Path) -> None:
    with _written(tmp_path, ".csv").open(newline="") as file:
        header, *rows = csv.reader(file)
    assert header == ["grid_0", "grid_1", "grid_2", "grid_3", "count", "half_0", "half_1"]
    assert np.array_equal(np.array([row[:4] for row in rows], "f4").reshape(-1, 2, 2), GRID)
    assert [int(row[4]) for row in rows] == COUNT.tolist()


def test_arrays_hold_every_bit_and_their_own_type(tmp_path: Path) -> None:
    with np.load(_written(tmp_path, ".npz"), allow_pickle=False) as found:
        assert found["count"].dtype == np.int64 and found["half"].dtype == np.float32
        for name, expected in (("grid", GRID), ("count", COUNT), ("half", WIDE)):
            assert np.array_equal(found[name], expected)
    tensors = load_file(_written(tmp_path, ".safetensors"))
    assert tensors["half"].dtype is torch.bfloat16 and np.array_equal(tensors["grid"].numpy(), GRID)
    assert np.array_equal(tensors["half"].view(torch.uint16).numpy(), HALF) and tensors["count"].tolist() == COUNT.tolist()


def _classes(datatype: str = "FP32", *more: TensorSignature, labels: tuple[str, ...] | None = ("cat", "dog")) -> ModelSignature:
    return ModelSignature("net", (), (TensorSignature("output", datatype, (-1, 2)), *more), labels)


def test_labels_and_scores_where_there_are_classes() -> None:
    lines = JsonLines(_classes())
    scores = np.array([[0.25, 0.75], [2.0, 0.0], [np.nan, 0.0], [-1000.0, 1000.0]], "f4")
    encoded = lines.encode(Answers([scores], ["a.png", "b.png", "c.png", "d.png"]))
    rows = [json.loads(line) for line in encoded.splitlines()]
    assert list(rows[0]) == ["file", "output", "label", "score"]
    assert [(row["file"], row["label"]) for row in rows] == [
        ("a.png", "dog"), ("b.png", "cat"), ("c.png", None), ("d.png", "dog"),
    ]  # fmt: skip
    # Probabilities stay, other scores go through a softmax; JSON has no word for NaN.
    assert rows[0]["score"] == 0.75 and rows[3]["score"] == 1.0 and rows[2]["score"] is None
    assert rows[1]["score"] == pytest.approx(1 / (1 + math.exp(-2)), abs=1e-12)
    assert rows[2]["output"] == [None, 0.0]
    table = format_of(".csv", _classes(), True)
    assert table.head() == b"file,output_0,output_1,label,score\n"
    assert table.encode(Answers([scores[:1]], ["a,b.png"])) == b'"a,b.png",0.25,0.75,dog,0.75\n'


@pytest.mark.parametrize(
    "signature",
    [
        _classes(labels=None), _classes(labels=("a", "b", "c")), _classes("INT64"),
        _classes("FP32", TensorSignature("other", "FP32", (-1, 2))), _classes("FP32", TensorSignature("label", "INT64", (-1,))),
    ],
    ids=["none", "other number", "whole numbers", "two candidates", "name taken"],
)  # fmt: skip
def test_no_labels_where_it_is_not_clear_what_they_are_of(signature: ModelSignature) -> None:
    assert Labels.of(signature) is None


def test_the_format_is_by_the_end_of_the_name() -> None:
    assert [suffix_of(Path(name)) for name in ("a", "a.jsonl", "a.b.CSV")] == [".jsonl", ".jsonl", ".csv"]
    with pytest.raises(RequestError, match=r"a.json ends in .json; give a file that ends in .jsonl, .csv"):
        suffix_of(Path("a.json"))


def test_answers_as_long_as_their_rows_go_into_json_lines_alone() -> None:
    spec = TensorSignature("hidden", "FP32", (-1, -1, 2), longest=3)
    signature = ModelSignature("net", (), (spec,))
    padded = np.arange(12, dtype="f4").reshape(2, 3, 2)
    encoded = format_of(".jsonl", signature, False).encode(Answers([padded], lengths=np.array([1, 3])))
    rows = [json.loads(line)["hidden"] for line in encoded.splitlines()]
    assert rows == [[[0, 1]], [[6, 7], [8, 9], [10, 11]]]
    for suffix in (".csv", ".npz", ".safetensors"):
        with pytest.raises(RequestError, match="hidden of net is as long as its row; give a .jsonl"):
            format_of(suffix, signature, False)
