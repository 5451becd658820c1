"""Folders of pictures become rows."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from shoal.data import folder
from shoal.errors import DataError
from shoal.serve.signature import TensorSignature
from shoal.serve.tables.pictures import FolderRows


def _spec(datatype: str = "FP32", *shape: int) -> TensorSignature:
    return TensorSignature("input", datatype, (-1, *(shape or (3, 4, 6))))


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Five pictures of 6 × 4 pixels in two folders."""
    for number in range(5):
        where = tmp_path / "set" / f"class{number % 2}"
        where.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (4, 6, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(where / f"{number}.png")
    (tmp_path / "set" / "notes.txt").write_text("no picture")
    return tmp_path / "set"


def test_pictures_are_what_training_on_them_gets(pictures: Path) -> None:
    trained_on, _ = folder(pictures).batch(np.arange(5))
    rows = FolderRows(pictures, (_spec(),))
    assert rows.total == 5
    first, second = rows.read(3), rows.read(3)
    assert first is not None and second is not None and rows.read(3) is None
    assert np.array_equal(np.concatenate([first[0], second[0]]), trained_on.numpy())
    assert rows.files() == []


@pytest.mark.parametrize("datatype", ["UINT8", "FP16", "FP64", "BF16"])
def test_pictures_come_in_the_type_that_the_model_takes(pictures: Path, datatype: str) -> None:
    read = FolderRows(pictures, (_spec(datatype),)).read(1)
    assert read is not None
    raw = np.asarray(Image.open(pictures / "class0" / "0.png")).transpose(2, 0, 1)
    scaled = torch.from_numpy(raw.copy()).float() / 255
    expected = {
        "UINT8": raw, "FP16": scaled.half().numpy(), "FP64": raw / 255,
        "BF16": scaled.bfloat16().view(torch.uint16).numpy(),
    }[datatype]  # fmt: skip
    assert read[0].dtype == expected.dtype and np.array_equal(read[0][0], expected)


def test_grey_and_channels_last(pictures: Path) -> None:
    grey = Image.open(pictures / "class0" / "0.png").convert("L")
    read = FolderRows(pictures, (_spec("UINT8", 1, 4, 6),)).read(1)
    assert read is not None and np.array_equal(read[0][0, 0], np.asarray(grey))
    read = FolderRows(pictures, (_spec("UINT8", 4, 6, 3),)).read(1)
    assert read is not None and np.array_equal(read[0][0], np.asarray(Image.open(pictures / "class0" / "0.png")))


def test_rows_are_named_and_marked_by_their_files(pictures: Path) -> None:
    rows = FolderRows(pictures, (_spec(),))
    assert rows.read(2) is not None and rows.files() == ["class0/0.png", "class0/2.png"]
    again = FolderRows(pictures, (_spec(),))
    again.skip(2)
    assert again.mark == rows.mark and again.at == 2
    later = pictures / "class1" / "1.png"
    os.utime(later, ns=(1, 1))  # not passed yet: it may still change
    again = FolderRows(pictures, (_spec(),))
    again.skip(2)
    assert again.mark == rows.mark
    os.utime(pictures / "class0" / "0.png", ns=(1, 1))
    again = FolderRows(pictures, (_spec(),))
    again.skip(2)
    assert again.mark != rows.mark


def test_what_is_no_picture_for_this_model_is_said_so(pictures: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="the model takes none"):
        FolderRows(pictures, (TensorSignature("x", "FP32", (-1, 12)),))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds no pictures"):
        FolderRows(tmp_path / "empty", (_spec(),))
    with pytest.raises(DataError, match="0.png is 6 × 4 pixels and the model takes 8 × 8; resize"):
        FolderRows(pictures, (_spec("FP32", 3, 8, 8),)).read(1)
    (pictures / "class0" / "2.png").write_bytes(b"\x89PNG broken")
    rows = FolderRows(pictures, (_spec(),))
    read = rows.read(4)
    assert read is not None and len(read[0]) == 1 and rows.files() == ["class0/0.png"]
    with pytest.raises(DataError, match="2.png cannot be decoded"):
        rows.read(4)
