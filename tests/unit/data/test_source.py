"""Sources: the same batches as torch's own loader would make, whatever kind of data they stand on."""

from __future__ import annotations

from collections import namedtuple
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset, TensorDataset

from shoal.data import ArrayDataset, Images
from shoal.data.source import open_source
from shoal.errors import DataError, JobError

X, Y = torch.arange(24.0).reshape(8, 3), torch.arange(8) * 10
INDICES = np.array([5, 0, 5, 2], dtype=np.int64)
Pair = namedtuple("Pair", ["ids", "mask"])


class Items(Dataset[Any]):
    """Items with a draw from the global stream, as an augmentation makes."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> dict[str, Any]:
        assert type(index) is int
        return {"x": X[index], "y": int(Y[index]), "noise": torch.rand(2)}


class ItemLists(Items):
    def __init__(self) -> None:
        self.calls: list[list[int]] = []

    def __getitems__(self, indices: list[int]) -> list[Any]:
        self.calls.append(indices)
        return [self[index] for index in indices]


class Batches:
    def __len__(self) -> int:
        return 8

    def __getitem__(self, index: int) -> Any:
        return X[index], Y[index]

    def batch(self, indices: np.ndarray) -> Any:
        return "gathered", X[torch.from_numpy(indices)]


class OtherBatches(Batches):
    def batch(self, batch_size: int) -> Any:  # type: ignore[override]
        raise AssertionError("another library's batch(batch_size) is not batch(indices)")


def reseed(index: int) -> None:
    torch.manual_seed(index)


def listener() -> tuple[list[int], Any]:
    heard: list[int] = []
    return heard, heard.append


@pytest.mark.parametrize(
    "value",
    [
        pytest.param((X, Y), id="tuple"),
        pytest.param([X, Y], id="list"),
        pytest.param(TensorDataset(X, Y), id="TensorDataset"),
        pytest.param(lambda: (X, Y), id="function"),
        pytest.param((X.numpy(), Y.numpy()), id="numpy"),
        pytest.param(Subset(TensorDataset(X, Y), range(8)), id="subset"),
    ],
)
def test_tensors_are_gathered(value: Any) -> None:
    source = open_source(value, "train_data")
    heard, listen = listener()
    batch = source.fetch(INDICES, None, listen)
    assert source.vectorised and len(source) == 8 and heard == []
    assert type(batch) is tuple and torch.equal(batch[0], X[INDICES]) and torch.equal(batch[1], Y[INDICES])
    batch[0].zero_()
    assert X[5, 0] == 15


def test_nested_and_dict_columns() -> None:
    source = open_source({"input": Pair(X, [Y, Y + 1]), "target": Y}, "train_data")
    batch = source.fetch(INDICES)
    assert isinstance(batch["input"], Pair) and torch.equal(batch["input"].mask[1], Y[INDICES] + 1)
    assert torch.equal(batch["target"], Y[INDICES])
    items = source.fetch(INDICES, collate=list)
    assert items[3]["input"].ids.tolist() == X[2].tolist() and items[3]["target"].item() == 20


def test_a_collate_gets_the_samples() -> None:
    for value in ((X, Y), TensorDataset(X, Y), Batches()):
        batch = open_source(value, "train_data").fetch(INDICES, collate=lambda samples: [y.item() for _, y in samples])
        assert batch == [50, 0, 50, 20]


def test_items_one_by_one_with_reseeding() -> None:
    source = open_source(Items(), "train_data")
    first, second = source.fetch(INDICES, None, reseed), source.fetch(INDICES[::-1].copy(), None, reseed)
    assert not source.vectorised
    assert torch.equal(first["x"], X[INDICES]) and first["y"].tolist() == [50, 0, 50, 20]
    # A sample's random numbers depend on the sample alone, not on its neighbours.
    assert torch.equal(first["noise"], second["noise"].flip(0))
    assert torch.equal(first["noise"][0], first["noise"][2]) and not torch.equal(first["noise"][0], first["noise"][1])
    assert isinstance(source.fetch(INDICES, collate=list), list)


def test_a_list_of_samples_is_a_data_set() -> None:
    source = open_source([(X[n], int(Y[n])) for n in range(8)], "train_data")
    assert not source.vectorised and source.fetch(INDICES)[1].tolist() == [50, 0, 50, 20]


def test_getitems_gets_the_whole_list() -> None:
    dataset = ItemLists()
    heard, listen = listener()
    batch = open_source(dataset, "train_data").fetch(INDICES, None, listen)
    assert dataset.calls == [[5, 0, 5, 2]] and heard == [5] and torch.equal(batch["x"], X[INDICES])


def test_our_own_data_sets_are_vectorised() -> None:
    images = Images(np.zeros((8, 4, 4, 3), np.uint8), Y.numpy() // 10, [str(n) for n in range(8)])
    for value in (images, ArrayDataset(X, Y // 10)):
        source = open_source(value, "train_data")
        assert source.vectorised and source.fetch(INDICES)[1].tolist() == [5, 0, 5, 2]
    assert open_source(Batches, "train_data").fetch(INDICES)[0] == "gathered"


def test_another_librarys_batch_is_not_taken_for_ours() -> None:
    source = open_source(OtherBatches(), "train_data")
    assert not source.vectorised and source.fetch(INDICES)[1].tolist() == [50, 0, 50, 20]


def test_subsets() -> None:
    part = Subset(Subset(Items(), [7, 5, 3, 1]), [2, 0])
    source = open_source(part, "train_data")
    heard, listen = listener()
    batch = source.fetch(np.array([1, 0, 1]), None, listen)
    assert len(source) == 2 and batch["y"].tolist() == [70, 30, 70] and heard == [1, 0, 1]
    assert source.fetch(np.array([0]), list)[0]["y"] == 30
    gathered = open_source(Subset(Batches(), [7, 3]), "train_data")  # type: ignore[arg-type]
    assert gathered.vectorised and torch.equal(gathered.fetch(np.array([1]))[1], X[3:4])
    backwards = open_source(Subset(TensorDataset(X), [-1, 0]), "train_data")
    assert torch.equal(backwards.fetch(np.array([0]))[0], X[7:8])
    of_tensors = open_source(Subset([X[0], X[1], X[2]], [2, 1]), "train_data")  # type: ignore[arg-type]
    assert torch.equal(of_tensors.fetch(np.array([0, 1])), X[[2, 1]])
    lists = ItemLists()
    open_source(Subset(lists, [7, 5]), "train_data").fetch(np.array([1, 0]))
    assert lists.calls == [[5, 7]]


def test_batches_are_those_of_torchs_loader() -> None:
    for value in (TensorDataset(X, Y), [(X[n], int(Y[n])) for n in range(8)]):
        expected = next(iter(DataLoader(value, batch_sampler=[INDICES.tolist()])))  # type: ignore[arg-type]
        for ours, theirs in zip(open_source(value, "train_data").fetch(INDICES), expected, strict=True):
            assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        return iter([1, 2])


class NoLength(Dataset[Any]):
    def __getitem__(self, index: int) -> int:
        return index


@pytest.mark.parametrize(
    ("value", "error", "sentence"),
    [
        (Stream(), JobError, "eval_data is an IterableDataset"),
        (Stream, JobError, "eval_data is an IterableDataset"),
        (Subset(Stream(), [0]), JobError, "eval_data is an IterableDataset"),
        (DataLoader(TensorDataset(X)), JobError, "eval_data is a DataLoader; give its dataset"),
        ("train.csv", JobError, r"eval_data is a text; give shoal.data.load\(path\)"),
        (iter([1]), JobError, "eval_data is a list_iterator, which is not a data set"),
        (None, JobError, "eval_data is a NoneType"),
        (5, JobError, "eval_data is an int, which"),
        (NoLength(), JobError, "eval_data has no length"),
        ((X, "labels"), JobError, "eval_data holds a str where a tensor should be"),
        ((X, Y[:5]), DataError, r"different lengths \(8, 5\)"),
        ((X[:0], Y[:0]), DataError, "eval_data is empty"),
        ((), DataError, "eval_data is empty"),
        ([], DataError, "eval_data is empty"),
        (lambda: [], DataError, "eval_data is empty"),
        ((torch.tensor(1.0),), DataError, "without dims"),
    ],
)
def test_what_is_no_data_set(value: Any, error: type[Exception], sentence: str) -> None:
    with pytest.raises(error, match=sentence):
        open_source(value, "eval_data")


def test_the_users_own_errors_are_passed_on() -> None:
    def build() -> Any:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        open_source(build, "train_data")
