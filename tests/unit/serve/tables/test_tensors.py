"""Arrays from files and from memory become rows, piece by piece."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.utils.data import Dataset, TensorDataset

from shoal.data import Images, load
from shoal.errors import DataError, RequestError, UserCodeError
from shoal.serve.signature import TensorSignature
from shoal.serve.tables.opened import open_rows
from shoal.serve.tables.rows import Rows

X = TensorSignature("input", "FP32", (-1, 2, 3))
LEFT, RIGHT = TensorSignature("left", "FP32", (-1, 2)), TensorSignature("right", "INT32", (-1,))
VALUES = np.random.default_rng(0).standard_normal((7, 2, 3)).astype("f4")
PAIR = {"left": np.arange(14, dtype="f4").reshape(7, 2), "right": np.arange(7)}


def _open(data: Any, *specs: TensorSignature) -> Rows:
    return open_rows(data, specs, True, lambda line: None)


def _all(rows: Rows) -> list[np.ndarray]:
    parts = []
    while (read := rows.read(3)) is not None:
        parts.append(read)
    assert rows.at == rows.total == 7
    return [np.concatenate(column) for column in zip(*parts, strict=True)]


def _saved(tmp_path: Path, kind: str, values: Any) -> Path:
    path = tmp_path / f"data.{kind}"
    named = values if isinstance(values, dict) else {"input": values}
    if kind == "npy":
        np.save(path, values)
    elif kind == "npz":
        np.savez(path, **named)
    elif kind == "safetensors":
        save_file({name: torch.as_tensor(value).contiguous() for name, value in named.items()}, path)
    else:
        torch.save({name: torch.as_tensor(value) for name, value in named.items()}, path)
    return path


@pytest.mark.parametrize("kind", ["npy", "npz", "safetensors", "pt"])
@pytest.mark.parametrize("change", [lambda x: x, lambda x: x.astype("f8"), np.asfortranarray], ids=["", "f8", "fortran"])
def test_one_array_of_each_kind(tmp_path: Path, kind: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    path = _saved(tmp_path, kind, change(VALUES))
    rows = _open(path, X)
    (found,) = _all(rows)
    assert found.dtype == np.float32 and np.array_equal(found, VALUES)
    rows.close()
    later = _open(path, X)
    later.skip(4)
    read = later.read(2)
    assert read is not None and np.array_equal(read[0], VALUES[4:6]) and later.mark == rows.mark
    later.close()


@pytest.mark.parametrize("kind", ["npz", "safetensors", "pt"])
def test_arrays_by_name_of_each_kind(tmp_path: Path, kind: str) -> None:
    left, right = _all(_open(_saved(tmp_path, kind, {**PAIR, "more": np.zeros(3)}), LEFT, RIGHT))
    assert np.array_equal(left, PAIR["left"]) and right.dtype == np.int32 and right.tolist() == list(range(7))


def test_compressed_arrays_and_those_of_training(tmp_path: Path) -> None:
    np.savez_compressed(tmp_path / "a.npz", x=VALUES, y=np.arange(7))
    assert np.array_equal(_all(_open(tmp_path / "a.npz", X))[0], VALUES)
    torch.save((torch.from_numpy(VALUES), torch.arange(7)), tmp_path / "a.pt")
    assert np.array_equal(_all(_open(tmp_path / "a.pt", X))[0], VALUES)
    torch.save(torch.from_numpy(VALUES), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert np.array_equal(_all(_open(tmp_path / "old.pt", X))[0], VALUES)


@pytest.mark.parametrize("shape", [(7, 4, 5, 3), (7, 4, 5)])
def test_pictures_in_an_npz_are_what_training_on_it_gets(tmp_path: Path, shape: tuple[int, ...]) -> None:
    raw = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    np.savez(tmp_path / "a.npz", x=raw, y=np.arange(7))
    trained_on = load(tmp_path / "a.npz").batch(np.arange(7))[0].numpy()
    (found,) = _all(_open(tmp_path / "a.npz", TensorSignature("input", "FP32", (-1, *trained_on.shape[1:]))))
    assert found.dtype == np.float32 and np.array_equal(found, trained_on)


@pytest.mark.parametrize("kind", ["safetensors", "pt"])
def test_bfloat16_goes_in_as_it_is_or_widened(tmp_path: Path, kind: str) -> None:
    tensor = torch.from_numpy(VALUES).bfloat16()
    path = tmp_path / f"a.{kind}"
    if kind == "pt":
        torch.save(tensor, path)
    else:
        save_file({"input": tensor}, path)
    (bits,) = _all(_open(path, TensorSignature("input", "BF16", (-1, 2, 3))))
    assert np.array_equal(bits, tensor.view(torch.uint16).numpy())
    (wide,) = _all(_open(path, X))
    assert np.array_equal(wide, tensor.float().numpy())


class _Items(Dataset[Any]):
    def __len__(self) -> int:
        return 7

    def __getitem__(self, index: int) -> Any:
        return torch.from_numpy(VALUES[index]), index


@pytest.mark.parametrize(
    "data",
    [
        VALUES, torch.from_numpy(VALUES), VALUES.tolist(), {"input": VALUES}, (VALUES, np.arange(7)), [VALUES],
        TensorDataset(torch.from_numpy(VALUES), torch.arange(7)), _Items(), [(row, 0) for row in torch.from_numpy(VALUES)],
    ],
    ids=["array", "tensor", "lists", "mapping", "pair", "sequence", "tensor data set", "data set", "samples"],
)  # fmt: skip
def test_what_a_caller_may_hand_over(data: Any) -> None:
    assert np.array_equal(_all(_open(data, X))[0], VALUES)


def test_two_inputs_from_memory() -> None:
    right = TensorDataset(torch.from_numpy(PAIR["left"]), torch.arange(7))
    for data in (PAIR, (PAIR["left"], PAIR["right"]), right, [{"left": torch.ones(2) * k, "right": k} for k in range(7)]):
        assert _all(_open(data, LEFT, RIGHT))[1].tolist() == list(range(7))


def test_pictures_as_bytes_where_the_model_takes_bytes() -> None:
    raw = np.random.default_rng(0).integers(0, 256, (7, 4, 5, 3), dtype=np.uint8)
    images = Images(raw, np.zeros(7), ["a"])
    assert np.array_equal(_all(_open(images, TensorSignature("input", "UINT8", (-1, 3, 4, 5))))[0], raw.transpose(0, 3, 1, 2))
    (scaled,) = _all(_open(images, TensorSignature("input", "FP32", (-1, 3, 4, 5))))
    assert np.array_equal(scaled, images.batch(np.arange(7))[0].numpy())


def test_the_mark_of_what_is_in_memory_is_of_its_values() -> None:
    changed = VALUES.copy()
    changed[6, 1, 2] += 1
    marks = [_open(data, X).mark for data in (VALUES, VALUES.copy(), changed)]
    assert marks[0] == marks[1] != marks[2]
    assert _open(torch.from_numpy(VALUES).bfloat16(), X).mark != _open(torch.from_numpy(VALUES), X).mark


class _Harm:
    def __reduce__(self) -> Any:
        return print, ("harm",)


def test_files_that_make_no_sense(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.save(tmp_path / "objects.npy", np.array([_Harm()], dtype=object))
    np.savez(tmp_path / "objects.npz", input=np.array([_Harm()], dtype=object))
    (tmp_path / "harm.pt").write_bytes(pickle.dumps(_Harm(), protocol=2))
    torch.save({"input": _Harm()}, tmp_path / "harm2.pt")
    for kind in ("npy", "npz", "safetensors", "pt"):
        (tmp_path / f"broken.{kind}").write_bytes(b"nothing of the kind")
    np.save(tmp_path / "cut.npy", VALUES)
    (tmp_path / "cut.npy").write_bytes((tmp_path / "cut.npy").read_bytes()[:-8])
    for name in ("objects.npy", "objects.npz", "harm.pt", "harm2.pt", *(f"broken.{k}" for k in ("npy", "npz", "pt"))):
        with pytest.raises(DataError, match=name):
            _open(tmp_path / name, X)
    for name in ("broken.safetensors", "cut.npy"):
        with pytest.raises(DataError, match="cannot be read as tensors"):
            _open(tmp_path / name, X)
    assert capsys.readouterr().out == ""


def test_an_npz_that_is_damaged_is_found_where_it_is(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", input=np.zeros((3000, 2, 3), "f4"))
    raw = bytearray((tmp_path / "a.npz").read_bytes())
    raw[50_000] ^= 1  # a byte of a value: the checksum at the end is wrong
    (tmp_path / "a.npz").write_bytes(raw)
    rows = _open(tmp_path / "a.npz", X)
    assert rows.read(100) is not None
    with pytest.raises(DataError, match="rows 101 to 3,000 of a.npz: input cannot be read .Bad CRC-32"):
        rows.read(5000)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (VALUES[:, 0], r"input has the shape \[7, 3\] and the model takes \[-1, 2, 3\]"),
        (np.ones(()), r"input has the shape \[\]"),
        ({"inptu": VALUES, "b": VALUES}, 'no array "input". Did you mean "inptu"'),
        ((VALUES, VALUES, VALUES), "holds 3 tensors and the model takes 1"),
        ({"input": torch.eye(3).to_sparse()}, "not a dense tensor"),
        ([], r"input has the shape \[0\]"),
        (7, "not a data set"),
        ([(torch.ones(3), 1)] * 7, r"rows of shape \[3\]"),
    ],
)  # fmt: skip
def test_values_that_make_no_sense(data: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        _all(_open(data, X))


def test_numbers_that_do_not_fit_are_named_with_their_rows() -> None:
    rows = _open({"left": PAIR["left"], "right": np.array([0, 1, 2, 3, 2**40, 5, 6])}, LEFT, RIGHT)
    assert rows.read(3) is not None
    with pytest.raises(DataError, match="rows 4 to 6 of data: right has a number outside"):
        rows.read(3)
    with pytest.raises(DataError, match="unequal numbers of rows"):
        _open({"left": PAIR["left"], "right": np.arange(6)}, LEFT, RIGHT)


def test_what_the_callers_own_data_set_raises_is_theirs() -> None:
    class Broken(_Items):
        def __getitem__(self, index: int) -> Any:
            raise KeyError("mine")

    with pytest.raises(UserCodeError, match="the data set raised KeyError"):
        _open(Broken(), X).read(1)


def test_data_that_is_nowhere_or_of_no_kind(tmp_path: Path) -> None:
    (tmp_path / "a.xyz").write_text("")
    (tmp_path / "a.npy").mkdir()
    for data, message in (
        (tmp_path / "none.csv", "There is no data at"), ("cifar1", 'Did you mean "cifar10"'),
        (tmp_path / "a.xyz", "no known kind"), (tmp_path / "a.npy", "the model takes none"),
    ):  # fmt: skip
        with pytest.raises(RequestError, match=message):
            _open(data, X)
    with pytest.raises(DataError, match="one array and the model takes left, right; give an .npz"):
        _open(_saved(tmp_path / "a.npy", "npy", VALUES), LEFT, RIGHT)
