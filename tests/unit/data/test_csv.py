"""CSV files with pictures: what they give, and which row is at fault."""

from __future__ import annotations

import base64
import csv as csv_format
import io
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from shoal.data import csv, load
from shoal.errors import DataError


def pixels(seed: int, height: int = 6, width: int = 8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(array: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, "PNG")
    return buffer.getvalue()


def text(array: np.ndarray) -> str:
    return base64.b64encode(png(array)).decode()


def write(path: Path, *rows: str) -> Path:
    path.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """A folder data/ with pictures 0.png … 5.png, as the CSV files beside them name them."""
    folder = tmp_path / "data" / "images"
    folder.mkdir(parents=True)
    for seed in range(6):
        (folder / f"{seed}.png").write_bytes(png(pixels(seed)))
    return tmp_path / "data"


def check_contents(dataset: object, seeds: range) -> None:
    inputs, _ = dataset.batch(np.arange(len(seeds)))  # type: ignore[attr-defined]
    expected = np.stack([pixels(seed) for seed in seeds]).transpose(0, 3, 1, 2)
    assert torch.equal(inputs, torch.from_numpy(expected).to(torch.float32) / 255)


def test_paths_are_relative_to_the_csv_file(data: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write(data / "train_data.csv", "image,label", *(f"images/{n}.png,{n % 3}" for n in range(6)))
    monkeypatch.chdir(tmp_path)
    dataset = csv("data/train_data.csv")
    check_contents(dataset, range(6))
    assert dataset.labels.tolist() == [0, 1, 2, 0, 1, 2] and dataset.classes == ("0", "1", "2")


def test_base64_and_paths_in_one_file_with_names_as_labels(data: Path) -> None:
    rows = [f"{text(pixels(n))},{'cat' if n % 2 else 'ant'}" for n in range(3)]
    rows += [f'"data:image/png;base64,{text(pixels(3))}",dog']
    dataset = csv(write(data / "train_data.csv", "image,label", *rows, "images/4.png,cat"))
    check_contents(dataset, range(5))
    assert dataset.classes == ("ant", "cat", "dog") and dataset.labels.tolist() == [0, 1, 0, 2, 1]


def test_a_large_base64_picture_and_folded_lines(data: Path) -> None:
    large = pixels(1, 400, 400)  # over the 128 KiB that Python's csv allows by default
    encoded = text(large)
    folded = "\n".join(encoded[at : at + 76] for at in range(0, len(encoded), 76))
    before = csv_format.field_size_limit()
    dataset = csv(write(data / "a.csv", "image,label", f"{encoded},0", f'"{folded}",1'))
    assert np.array_equal(dataset.images, np.stack([large, large]))  # type: ignore[arg-type]
    assert csv_format.field_size_limit() == before


def test_other_columns_their_order_spaces_bom_and_blank_lines(data: Path) -> None:
    path = data / "a.csv"
    path.write_bytes("\ufeffid, kind ,photo\r\n7, b ,images/0.png\r\n\r\n8,a, images/1.png\r\n".encode())
    dataset = csv(path, image="photo", label="kind")
    check_contents(dataset, range(2))
    assert dataset.classes == ("a", "b") and dataset.labels.tolist() == [1, 0]


def test_pictures_become_the_first_ones_size_in_rgb(data: Path) -> None:
    Image.new("L", (20, 30), 200).save(data / "gray.jpg")
    path = write(data / "a.csv", "image,label", "images/0.png,0", "gray.jpg,1")
    assert csv(path).size == (6, 8)
    other = csv(path, size=(3, 5))
    assert other.size == (3, 5) and csv(path, size=4).size == (4, 4)
    assert np.all(other.images[1] == 200)  # type: ignore[index]
    with pytest.raises(DataError, match="size is"):
        csv(path, size=0)


def test_evaluation_data_gets_the_training_classes(data: Path) -> None:
    train = csv(write(data / "train.csv", "image,label", *(f"images/{n}.png,{'xyz'[n % 3]}" for n in range(6))))
    test = write(data / "test.csv", "image,label", "images/0.png,z", "images/1.png,y", "images/2.png,1")
    assert csv(test, classes=train.classes).labels.tolist() == [2, 1, 1]
    assert load(test, classes=train.classes).classes == ("x", "y", "z")  # type: ignore[union-attr]
    for label in ("w", "3", "-1", "", "1.0"):
        bad = write(data / "bad.csv", "image,label", "images/0.png,z", f"images/1.png,{label}")
        with pytest.raises(DataError, match=f'bad.csv, row 3: the label "{label}" is none of the 3 known classes'):
            csv(bad, classes=train.classes)


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ("images/1.png,", "row 4: the label is empty"),
        ("images/1.png,-1", 'row 4: the label "-1" is no class; give a whole number'),
        ("images/1.png,1.5", 'row 4: the label "1.5" is no class'),
        ("images/1.png,1e0", 'row 4: the label "1e0" is no class'),
        ("images/1.png,nan", 'row 4: the label "nan" is no class'),
        ("images/1.png,2000000", 'row 4: the label "2000000" is no class'),
        (f"images/1.png,{'1' * 5000}", "row 4: the label .* is no class"),
        ("images/1.png,cat", 'row 4: the label "cat" is no class: the labels before it are whole numbers'),
        (",1", "row 4: the image is empty"),
        ("images/9.png,1", 'row 4: "images/9.png" is neither a file'),
        ("abcd,1", 'row 4: "abcd" is neither a file'),
        (f"{text(pixels(0))[:-3]},1", 'row 4: "iVBOR.*..." is neither a file .* nor base64'),
        (f"{text(pixels(0))[:80]},1", "row 4: the picture cannot be decoded"),
        ("images/broken.png,1", "row 4: the picture .*broken.png cannot be decoded"),
        ("images/text.png,1", r"row 4: the picture .*text.png cannot be decoded \(not a known picture format\)"),
        ("images/1.png", "row 4: it has 1 cells where the header has 2"),
        ("images/1.png,1,2", "row 4: it has 3 cells where the header has 2"),
    ],
)
def test_the_row_at_fault_is_named(data: Path, row: str, sentence: str) -> None:
    (data / "images" / "broken.png").write_bytes(png(pixels(1))[:100])
    (data / "images" / "text.png").write_text("hello")
    path = write(data / "train_data.csv", "image,label", "images/0.png,0", "images/2.png,1", row, "images/3.png,0")
    with pytest.raises(DataError, match=f"data/train_data.csv, {sentence}") as raised:
        csv(path)
    assert "\n" not in str(raised.value) and "0x" not in str(raised.value)


def test_a_number_among_names(data: Path) -> None:
    path = write(data / "a.csv", "image,label", "images/0.png,cat", "images/1.png,7")
    with pytest.raises(DataError, match='row 3: the label "7" is no class: the labels before it are names'):
        csv(path)


@pytest.mark.parametrize(
    ("contents", "sentence"),
    [
        (b"", 'row 1: there is no column "image"; the columns are none'),
        (b"image,lable\na,1\n", 'row 1: there is no column "label"; .* image, lable. Did you mean "lable"?'),
        (b"path,label\na,1\n", 'row 1: there is no column "image"; the columns are path, label'),
        (b"image,label\n", "has a header but no rows"),
        (b"image,label\n\xff\xfe,1\n", "is not UTF-8 text"),
    ],
)
def test_a_file_that_is_no_such_csv(tmp_path: Path, contents: bytes, sentence: str) -> None:
    (tmp_path / "a.csv").write_bytes(contents)
    with pytest.raises(DataError, match=sentence):
        csv(tmp_path / "a.csv")


def test_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="There is no file"):
        csv(tmp_path / "a.csv")


def test_more_than_fits_into_memory_is_decoded_batch_by_batch(data: Path) -> None:
    path = write(data / "a.csv", "image,label", *(f"images/{n}.png,{n}" for n in range(6)))
    dataset = csv(path, in_memory_mb=0)
    assert not isinstance(dataset.images, np.ndarray)
    check_contents(dataset, range(6))
    again = pickle.loads(pickle.dumps(dataset))
    assert torch.equal(again[-1][0], csv(path)[5][0])
    (data / "images" / "3.png").write_bytes(b"no longer a picture")
    with pytest.raises(DataError, match="a.csv, row 5: the picture"):
        dataset.batch(np.array([3]))
