"""Folders of class folders, and the one entry that recognises every kind of data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shoal.data import ArrayDataset, Images, folder, load
from shoal.errors import DataError


def picture(path: Path, value: int, size: tuple[int, int] = (4, 6)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (value, value, value)).save(path)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "pictures"
    picture(root / "dog" / "a.png", 10)
    picture(root / "cat" / "b.PNG", 20)
    picture(root / "cat" / "deep" / "a.png", 30, size=(9, 9))
    (root / "cat" / "notes.txt").write_text("no picture")
    (root / "README").write_text("no class")
    (root / ".hidden").mkdir()
    return root


def test_classes_and_files_are_sorted(root: Path) -> None:
    dataset = folder(root)
    assert dataset.classes == ("cat", "dog") and dataset.labels.tolist() == [0, 0, 1]
    assert dataset.size == (6, 4)
    assert dataset.images[:, 0, 0, 0].tolist() == [20, 30, 10]  # type: ignore[index]
    assert folder(root, size=3).size == (3, 3)


def test_evaluation_data_may_lack_classes(root: Path) -> None:
    dataset = folder(root, classes=("bird", "cat", "dog"))
    assert dataset.classes == ("bird", "cat", "dog") and dataset.labels.tolist() == [1, 1, 2]
    with pytest.raises(DataError, match='dog is not one of the 2 known classes. Did you mean "dogs"?'):
        folder(root, classes=("cat", "dogs"))


def test_a_big_folder_is_decoded_batch_by_batch(root: Path) -> None:
    dataset = folder(root, in_memory_mb=0)
    assert not isinstance(dataset.images, np.ndarray)
    assert np.array_equal(dataset.images.gather(np.arange(3)), folder(root).images)  # type: ignore[arg-type]


def test_bad_folders(root: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="There is no folder"):
        folder(tmp_path / "nowhere")
    with pytest.raises(DataError, match="has no subfolders"):
        folder(root / "dog")
    (root / "dog" / "c.jpg").write_bytes(b"\xff\xd8\xff broken")
    with pytest.raises(DataError, match="dog/c.jpg cannot be decoded"):
        folder(root)
    (root / "eel").mkdir()
    with pytest.raises(DataError, match="eel holds no pictures"):
        folder(root)


def test_load_recognises_each_kind(root: Path, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("image,label\npictures/dog/a.png,3\n")
    assert load(tmp_path / "a.csv", size=2).size == (2, 2)  # type: ignore[union-attr]
    assert len(load(str(root))) == 3
    np.savez(tmp_path / "numbers.npz", x=np.ones((4, 2), np.float32), y=np.arange(4.0))
    numbers = load(tmp_path / "numbers.npz")
    assert isinstance(numbers, ArrayDataset) and numbers.batch(np.array([2]))[1].tolist() == [2.0]
    np.savez(tmp_path / "gray.npz", x=np.full((4, 5, 6), 255, np.uint8), y=np.array([[0], [2], [1], [1]]))
    gray = load(tmp_path / "gray.npz")
    assert isinstance(gray, Images) and gray.classes == ("0", "1", "2") and gray.labels.tolist() == [0, 2, 1, 1]
    assert gray[0][0].shape == (1, 5, 6) and float(gray[0][0].min()) == 1.0
    with pytest.raises(DataError, match="gray.npz: Image 1 has the label 2"):
        load(tmp_path / "gray.npz", classes=("a", "b"))


@pytest.mark.parametrize(
    ("arrays", "sentence"),
    [
        ({"x": np.ones(3)}, 'has no array "y"; .* it holds x'),
        ({"x": np.ones(3), "y": np.ones(2)}, "both must begin with the same length"),
        ({"x": np.ones((0, 2)), "y": np.ones(0)}, "same length|no samples"),
        ({"x": np.array(["a"]), "y": np.ones(1)}, "x holds <U1; it must hold numbers"),
        ({"x": np.array([{}], dtype=object), "y": np.ones(1)}, "cannot be read as arrays"),
    ],
)
def test_npz_files_that_do_not_fit(tmp_path: Path, arrays: dict[str, np.ndarray], sentence: str) -> None:
    np.savez(tmp_path / "a.npz", **arrays)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=sentence):
        load(tmp_path / "a.npz")


def test_load_refuses_the_rest(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="There is no data at"):
        load(tmp_path / "nowhere")
    for name, sentence in (("a.txt", "no known kind of data set"), ("a.npz", "cannot be read as arrays")):
        (tmp_path / name).write_text("hello")
        with pytest.raises(DataError, match=sentence):
            load(tmp_path / name)
