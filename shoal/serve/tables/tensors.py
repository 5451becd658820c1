"""Arrays as rows: from files that are mapped or read piece by piece, or from the caller's memory."""

from __future__ import annotations

import hashlib
import sys
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shoal.data.arrays import Images
from shoal.data.source import Source, open_source
from shoal.errors import DataError, ShoalError, did_you_mean
from shoal.process.failure import user_code
from shoal.serve.pictures import as_input
from shoal.serve.signature import TensorSignature, layout_of
from shoal.serve.tables.columns import Column, NumpyColumn, TorchColumn, TrainingPictures, ZippedColumn, fits_rows
from shoal.serve.tables.rows import Rows, floats, row_shape


class ArrayRows(Rows):
    """A column for each input, None for one that is left out. ``mark``: what tells these arrays from others."""

    def __init__(self, what: str, columns: Sequence[Column | None], specs: Sequence[TensorSignature], mark: str) -> None:
        given = [(column, spec) for column, spec in zip(columns, specs, strict=True) if column is not None]
        for column, spec in given:
            if len(column.shape) == 0 or not fits_rows(column.shape[1:], spec):
                free = f", the second a length of 1 to {spec.longest}" if spec.free else ""
                raise DataError(
                    f"{what}: {spec.name} has the shape {list(column.shape)} and the model takes {list(spec.shape)}, "
                    f"where the first -1 is the number of rows{free}."
                )
        for places, words in ((0, "numbers of rows"), (1, "lengths")):
            found = {spec.name: column.shape[places] for column, spec in given if places == 0 or spec.free}
            if len(set(found.values())) > 1:
                told = ", ".join(f"{name} {count:,}" for name, count in found.items())
                raise DataError(f"{what}: the inputs have unequal {words} ({told}).")
        super().__init__(what, given[0][0].shape[0])
        self._length = next((column.shape[1] for column, spec in given if spec.free), None)
        self._columns = list(columns)
        self._specs = tuple(specs)
        self._mark = mark
        self._rows = 0

    def read(self, most: int) -> tuple[np.ndarray, ...] | None:
        assert self.total is not None
        first, stop = self.at, min(self.at + most, self.total)
        if first == stop:
            return None
        found = []
        for column, spec in zip(self._columns, self._specs, strict=True):
            try:
                found.append(self._left_out(stop - first, spec) if column is None else column.take(first, stop, spec))
            except ValueError as error:
                raise DataError(f"{self.where(first, stop - first)}: {spec.name} {error}.") from None
        self.at, self._rows = stop, stop - first
        return tuple(found)

    def _left_out(self, rows: int, spec: TensorSignature) -> np.ndarray:
        shape = (self._length or 1, *spec.shape[2:]) if spec.free else spec.shape[1:]
        return np.full((rows, *shape), spec.absent, spec.dtype)

    def lengths(self) -> np.ndarray | None:
        return None if self._length is None else np.full(self._rows, self._length, np.int32)

    def skip(self, rows: int) -> None:
        assert self.total is not None
        self.at = min(self.at + rows, self.total)

    @property
    def mark(self) -> str:
        return self._mark


class SourceRows(Rows):
    """A data set as a Job takes it: items of (input, target), dicts, or inputs alone."""

    def __init__(self, what: str, value: Any, specs: Sequence[TensorSignature]) -> None:
        self._source: Source = open_source(value, what)
        super().__init__(what, len(self._source))
        self._specs = tuple(specs)
        self._lengths: np.ndarray | None = None
        self._pictures = value if isinstance(value, Images) else None
        self._kind = type(value).__name__

    def read(self, most: int) -> tuple[np.ndarray, ...] | None:
        indices = np.arange(self.at, min(self.at + most, len(self._source)), dtype=np.int64)
        if not len(indices):
            return None
        where = self.where(self.at, len(indices))
        found = tuple(self._one(value, spec, where) for value, spec in self._inputs(indices, where))
        lengths = {array.shape[1] for array, spec in zip(found, self._specs, strict=True) if spec.free}
        if len(lengths) > 1:
            raise DataError(f"{where}: the inputs have unequal lengths ({', '.join(map(str, sorted(lengths)))}).")
        self._lengths = np.full(len(indices), lengths.pop(), np.int32) if lengths else None
        self.at += len(indices)
        return found

    def lengths(self) -> np.ndarray | None:
        return self._lengths

    def _inputs(self, indices: np.ndarray, where: str) -> list[tuple[Any, TensorSignature]]:
        spec = self._specs[0]
        if self._pictures is not None and self._pictures.images.shape[1:] == self._pixels(spec):
            images = self._pictures.images
            taken = np.take(images, indices, axis=0) if isinstance(images, np.ndarray) else images.gather(indices)
            return [(floats(as_input(taken, spec), spec), spec)]
        with user_code("the data set"):
            batch = self._source.fetch(indices)
        inputs = batch
        # (input, target), unless it is the two inputs of a model that takes two.
        if isinstance(batch, (tuple, list)) and len(batch) == 2:
            grouped = isinstance(batch[0], (tuple, list, Mapping))
            inputs = batch[0] if grouped or len(self._specs) == 1 else batch
        if isinstance(inputs, Mapping):
            missing = next((s.name for s in self._specs if s.name not in inputs), None)
            if missing is not None:
                raise DataError(f'{where}: there is no input "{missing}".{did_you_mean(missing, map(str, inputs))}')
            return [(inputs[s.name], s) for s in self._specs]
        given = list(inputs) if isinstance(inputs, (tuple, list)) else [inputs]
        if len(given) != len(self._specs):
            raise DataError(f"{where}: there are {len(given)} inputs and the model takes {len(self._specs)}.")
        return list(zip(given, self._specs, strict=True))

    def _pixels(self, spec: TensorSignature) -> tuple[int, ...] | None:
        """(height, width, channels) of a model that takes pictures and nothing else."""
        layout = layout_of(spec) if len(self._specs) == 1 else None
        return None if layout is None else (*layout[1:3], layout[0])

    @staticmethod
    def _one(value: Any, spec: TensorSignature, where: str) -> np.ndarray:
        if not _is_array(value):
            raise DataError(f"{where}: {spec.name} is {type(value).__name__}, not a tensor.")
        if not fits_rows(value.shape[1:], spec):
            raise DataError(
                f"{where}: {spec.name} has rows of shape {list(value.shape[1:])} and the model takes "
                f"{list(row_shape(spec))}."
            )
        column = NumpyColumn(value) if isinstance(value, np.ndarray) else TorchColumn(value, value.shape)
        try:
            return column.take(0, len(value), spec)
        except ValueError as error:
            raise DataError(f"{where}: {spec.name} {error}.") from None

    def skip(self, rows: int) -> None:
        self.at = min(self.at + rows, len(self._source))

    @property
    def mark(self) -> str:
        # Its items cannot be told from others without making them all again.
        return f"{self._kind} of {self.total}"


def npy(path: Path, specs: Sequence[TensorSignature]) -> Rows:
    """An ``.npy`` file, mapped. DataError where it is damaged, or the model takes more than one input."""
    _one_input(path, specs, "an .npz")
    try:
        # allow_pickle=False: an array file must not be able to run code.
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise _damaged(path, error) from None
    return ArrayRows(path.name, [NumpyColumn(array)], specs, _stamp(path))


def npz(path: Path, specs: Sequence[TensorSignature]) -> Rows:
    """An ``.npz`` file with an array for each input."""
    try:
        archive = zipfile.ZipFile(path)
        names = [name.removesuffix(".npy") for name in archive.namelist()]
        chosen = _chosen(path.name, names, specs)
        zipped = [None if name is None else ZippedColumn(archive, f"{name}.npy") for name in chosen]
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        raise _damaged(path, error) from None
    columns: list[Column | None] = list(zipped)
    if chosen == ["x"] and zipped[0] is not None and TrainingPictures.fits(zipped[0], specs[0]):
        columns = [TrainingPictures(zipped[0], specs[0])]
    return ArrayRows(path.name, columns, specs, _stamp(path))


def safetensors(path: Path, specs: Sequence[TensorSignature]) -> Rows:
    """A ``.safetensors`` file with a tensor for each input, mapped."""
    from safetensors import SafetensorError, safe_open

    try:
        file = safe_open(path, framework="pt")
        slices = [None if name is None else file.get_slice(name) for name in _chosen(path.name, list(file.keys()), specs)]
    except (OSError, SafetensorError) as error:
        raise _damaged(path, error) from None
    columns = [None if piece is None else TorchColumn(piece, piece.get_shape()) for piece in slices]
    return ArrayRows(path.name, columns, specs, _stamp(path))


def pt(path: Path, specs: Sequence[TensorSignature]) -> Rows:
    """A file of ``torch.save`` with a tensor, a pair (input, target), or a dict of tensors; nothing in it can run code."""
    value = _torch_load(path)
    return ArrayRows(path.name, [_column(t) for t in _tensors_in(path.name, value, specs)], specs, _stamp(path))


def in_memory(value: Any, specs: Sequence[TensorSignature], marked: bool) -> Rows:
    """What a caller hands over: an array, arrays by name or in order, or a data set as a Job takes it.

    ``marked``: whether ``mark`` has to tell it from other data, which costs reading it once.
    """
    what = "data"
    if isinstance(value, list) and not _are_arrays(value):
        value = _numbers(value)
    if isinstance(value, Mapping) or _is_array(value) or _are_arrays(value):
        tensors = _tensors_in(what, value, specs)
        return ArrayRows(what, [_column(t) for t in tensors], specs, _content(tensors) if marked else "")
    try:
        return SourceRows(what, value, specs)
    except ShoalError as error:
        raise DataError(str(error)) from None


def _column(tensor: Any) -> Column | None:
    if tensor is None:
        return None
    return NumpyColumn(tensor) if isinstance(tensor, np.ndarray) else TorchColumn(tensor, tensor.shape)


def _numbers(value: list[Any]) -> Any:
    """Nested lists of numbers as an array; another list as it is."""
    try:
        array = np.array(value)
    except (ValueError, TypeError, RuntimeError):
        return value
    return array if array.dtype.kind in "biuf" else value


def _are_arrays(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and bool(value) and all(map(_is_array, value))


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray) or _is_tensor(value)


def _is_tensor(value: Any) -> bool:
    # Nobody has a tensor who has not imported torch, and that takes longer than many a file of rows.
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _torch_load(path: Path) -> Any:
    import torch

    try:
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:
            # The older of torch's two formats cannot be mapped.
            return torch.load(path, map_location="cpu", weights_only=True)
    # torch raises a dozen unrelated types for a damaged file, and one more for what weights_only refuses.
    except Exception as error:
        if "weights_only" in str(error) or "Weights only" in str(error):
            raise DataError(
                f"{path.name} holds more than tensors, and such a file can run code; save a tensor, or a dict of tensors."
            ) from None
        raise _damaged(path, error) from None


def _tensors_in(what: str, value: Any, specs: Sequence[TensorSignature]) -> list[Any]:
    """The tensor of each input, found by name in a mapping and by place in a sequence."""
    if isinstance(value, Mapping):
        named = {str(name): part for name, part in value.items()}
        found = [None if name is None else named[name] for name in _chosen(what, list(named), specs)]
    elif isinstance(value, (tuple, list)):
        # One tensor more than inputs is the target of (input, target).
        if len(value) not in (len(specs), len(specs) + 1):
            raise DataError(f"{what} holds {len(value)} tensors and the model takes {len(specs)}; name them in a dict.")
        found = list(value[: len(specs)])
    else:
        if len(specs) > 1:
            raise DataError(f"{what} is one tensor and the model takes {_names(specs)}; give a dict of them.")
        found = [value]
    for part, spec in zip(found, specs, strict=True):
        if part is None:
            continue
        if not _is_array(part) or (_is_tensor(part) and str(part.layout) != "torch.strided"):
            raise DataError(f"{what}: {spec.name} is {type(part).__name__}, not a dense tensor.")
    return found


def _chosen(what: str, names: Sequence[str], specs: Sequence[TensorSignature]) -> list[str | None]:
    """The array for each input: of its name; for one input also ``x``, or the only one; None for one that may be left out."""
    if len(specs) == 1 and specs[0].name not in names:
        if "x" in names:
            return ["x"]
        if len(names) == 1:
            return list(names)
    for spec in specs:
        if spec.name not in names and (spec.absent is None or spec is specs[0]):
            near = did_you_mean(spec.name, names)
            raise DataError(
                f'{what} has no array "{spec.name}".{near} The model takes {_names(specs)}; there is '
                f"{', '.join(names)[:200] or 'none'}."
            )
    return [spec.name if spec.name in names else None for spec in specs]


def _names(specs: Sequence[TensorSignature]) -> str:
    return ", ".join(spec.name for spec in specs)


def _one_input(path: Path, specs: Sequence[TensorSignature], instead: str) -> None:
    if len(specs) > 1:
        raise DataError(f"{path.name} is one array and the model takes {_names(specs)}; give {instead} with all of them.")


def _damaged(path: Path, error: Exception) -> DataError:
    lines = str(error).strip().splitlines()
    said = (lines[0] if lines else type(error).__name__).rstrip(".")
    return DataError(f"{path} cannot be read as tensors ({said}).")


def _stamp(path: Path) -> str:
    status = path.stat()
    return f"{status.st_size} {status.st_mtime_ns}"


def _content(tensors: Sequence[Any]) -> str:
    total = hashlib.blake2b(digest_size=16)
    for tensor in tensors:
        if tensor is None:
            continue
        array = tensor
        if _is_tensor(tensor):
            import torch

            whole = tensor.detach().cpu().contiguous()
            array = whole.reshape(-1).view(torch.uint8).numpy() if whole.numel() else np.empty(0, np.uint8)
        total.update(f"{tuple(tensor.shape)} {tensor.dtype}\0".encode())
        total.update(np.ascontiguousarray(array).data.cast("B"))
    return total.hexdigest()
