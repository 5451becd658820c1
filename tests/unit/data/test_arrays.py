"""Data sets over arrays: a batch is the same as its single items, in either memory layout."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import default_collate

from shoal.data.arrays import ArrayDataset, Images
from shoal.errors import DataError

PIXELS = np.random.default_rng(0).integers(0, 256, (7, 5, 4, 3), dtype=np.uint8)
LABELS = np.array([0, 2, 1, 1, 0, 2, 2])
INDICES = np.array([3, 0, 6, 3], dtype=np.int64)


def images(channels_last: bool = False) -> Images:
    return Images(PIXELS, LABELS, ("a", "b", "c"), channels_last)


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_batch_is_scaled_pixels_and_nothing_else(channels_last: bool) -> None:
    inputs, targets = images(channels_last).batch(INDICES)
    expected = torch.from_numpy(PIXELS[INDICES]).permute(0, 3, 1, 2).to(torch.float32) / 255
    assert inputs.shape == (4, 3, 5, 4) and inputs.dtype == torch.float32
    assert torch.equal(inputs, expected)
    assert targets.dtype == torch.int64 and targets.tolist() == [1, 0, 2, 1]
    layout = torch.channels_last if channels_last else torch.contiguous_format
    assert inputs.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_batch_equals_its_collated_items(channels_last: bool) -> None:
    dataset = images(channels_last)
    inputs, targets = default_collate([dataset[int(index)] for index in INDICES])
    expected = dataset.batch(INDICES)
    assert torch.equal(inputs, expected[0]) and torch.equal(targets, expected[1])
    assert targets.dtype == expected[1].dtype


def test_images_behave_as_a_sequence() -> None:
    dataset = images()
    assert len(dataset) == 7 and dataset.size == (5, 4) and dataset.classes == ("a", "b", "c")
    assert torch.equal(dataset[-1][0], dataset[6][0])
    assert [target for _, target in dataset] == LABELS.tolist()  # type: ignore[attr-defined]
    with pytest.raises(IndexError):
        dataset[7]
    with pytest.raises(IndexError):
        dataset.batch(np.array([7]))


def test_a_batch_may_be_changed_without_changing_the_data() -> None:
    dataset = images()
    before = PIXELS.copy()
    inputs, targets = dataset.batch(INDICES)
    inputs.zero_()
    targets.zero_()
    assert np.array_equal(PIXELS, before) and dataset.labels.tolist() == LABELS.tolist()


@pytest.mark.parametrize(
    ("pixels", "labels", "sentence"),
    [
        (PIXELS.astype(np.float32), LABELS, "must be a uint8 array"),
        (PIXELS[0], LABELS, "must be a uint8 array"),
        (PIXELS, LABELS[:5], "7 images and 5 labels"),
        (PIXELS, LABELS + 1, "Image 1 has the label 3, but there are 3 classes"),
        (PIXELS, LABELS - 1, "Image 0 has the label -1"),
    ],
)
def test_images_that_do_not_fit(pixels: np.ndarray, labels: np.ndarray, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        Images(pixels, labels, ("a", "b", "c"))


@pytest.fixture
def mapped(tmp_path: Path) -> np.ndarray:
    np.save(tmp_path / "pixels.npy", np.repeat(PIXELS, 100, axis=0))
    array: np.ndarray = np.load(tmp_path / "pixels.npy", mmap_mode="r")
    return array


def test_a_mapped_array_is_pickled_by_its_file(mapped: np.ndarray) -> None:
    dataset = Images(mapped, np.repeat(LABELS, 100), ("a", "b", "c"))
    packed = pickle.dumps(dataset)
    assert len(packed) < mapped.nbytes / 4
    again = pickle.loads(packed)
    assert isinstance(again.images, np.memmap)
    assert torch.equal(again.batch(INDICES)[0], dataset.batch(INDICES)[0])


@pytest.mark.parametrize("part", [slice(0, 300), slice(100, None), slice(None, None, 2)])
def test_a_part_of_a_mapped_array_is_pickled_with_its_own_rows(mapped: np.ndarray, part: slice) -> None:
    dataset = ArrayDataset(mapped[part], np.arange(len(mapped[part])))
    again = pickle.loads(pickle.dumps(dataset))
    assert np.array_equal(again.inputs, mapped[part])


@pytest.mark.parametrize("as_tensors", [False, True])
def test_array_dataset(as_tensors: bool) -> None:
    inputs, labels = np.arange(12.0).reshape(6, 2), np.arange(6) * 10
    wrap = torch.from_numpy if as_tensors else np.asarray
    dataset = ArrayDataset(wrap(inputs), wrap(labels), transform=lambda batch: batch + 1)
    x, y = dataset.batch(np.array([4, 1]))
    assert x.dtype == torch.float64 and x.tolist() == [[9, 10], [3, 4]] and y.tolist() == [40, 10]
    assert len(dataset) == 6 and dataset[5][0].tolist() == [11, 12] and dataset[5][1].item() == 50
    x.zero_()
    assert inputs[4].tolist() == [8, 9]
    with pytest.raises(DataError, match="6 inputs and 5 labels"):
        ArrayDataset(inputs, labels[:5])


def test_array_dataset_takes_lists() -> None:
    assert ArrayDataset([[1.0], [2.0]], [0, 1]).batch(np.array([1]))[0].tolist() == [[2.0]]


def test_importing_the_room_does_not_import_torch() -> None:
    code = "import shoal.data, shoal.data.cifar10, sys; print('torch' in sys.modules, 'PIL' in sys.modules)"
    root = Path(__file__).resolve().parents[3]
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=root, check=True)
    assert answer.stdout.split() == ["False", "False"]
