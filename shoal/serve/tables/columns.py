"""One array as a column of rows: whole in memory, mapped, or read piece by piece."""

from __future__ import annotations

import math
import zipfile
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from shoal.serve.pictures import as_input
from shoal.serve.signature import TensorSignature
from shoal.serve.tables.pictures import is_picture
from shoal.serve.tables.rows import fit, row_shape

_PIECE_BYTES = 1 << 20


class Column(Protocol):
    """An array with the rows along its first dim."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    def take(self, first: int, stop: int, spec: TensorSignature) -> np.ndarray:
        """Return rows ``first`` to ``stop`` as the model's datatype. ValueError where they do not fit, see ``fit``."""
        ...


def fits_rows(shape: Sequence[int], spec: TensorSignature) -> bool:
    """Whether rows of this shape are those of an input."""
    wanted = row_shape(spec)
    if not spec.free:
        return tuple(shape) == wanted
    return len(shape) == len(wanted) and tuple(shape[1:]) == wanted[1:] and 0 < shape[0] <= (spec.longest or shape[0])


class NumpyColumn:
    """A NumPy array, also a mapped one."""

    def __init__(self, array: np.ndarray) -> None:
        self._array = array
        self.shape: tuple[int, ...] = array.shape

    def take(self, first: int, stop: int, spec: TensorSignature) -> np.ndarray:
        return fit(np.asarray(self._array[first:stop]), spec)


class TorchColumn:
    """A torch tensor, or a slice of a safetensors file, which gives one when indexed."""

    def __init__(self, tensor: Any, shape: Sequence[int]) -> None:
        self._tensor = tensor
        self.shape: tuple[int, ...] = tuple(shape)

    def take(self, first: int, stop: int, spec: TensorSignature) -> np.ndarray:
        import torch

        rows = self._tensor[first:stop].detach().cpu()
        if rows.dtype is torch.bfloat16:
            if spec.datatype == "BF16":
                bits: np.ndarray = rows.contiguous().view(torch.uint16).numpy()
                return bits
            rows = rows.float()
        return fit(rows.numpy(), spec)


class ZippedColumn:
    """An array in an ``.npz``: read from its beginning to its end, never whole."""

    def __init__(self, archive: zipfile.ZipFile, member: str) -> None:
        self._stream = archive.open(member)
        version = np.lib.format.read_magic(self._stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        self.shape, self._by_columns, self.dtype = read(self._stream)
        if self.dtype.hasobject:
            raise ValueError("it holds Python objects, not numbers")
        self._row_bytes = math.prod(self.shape[1:]) * self.dtype.itemsize
        self._at = 0
        self._whole: np.ndarray | None = None

    def take(self, first: int, stop: int, spec: TensorSignature) -> np.ndarray:
        if self._by_columns:
            # No row lies in one piece; written so, it has to be had whole.
            if self._whole is None:
                flat = np.frombuffer(self._read(math.prod(self.shape) * self.dtype.itemsize), self.dtype)
                self._whole = flat.reshape(self.shape, order="F")
            return fit(self._whole[first:stop], spec)
        while self._at < first:
            rows = min(first - self._at, max(1, _PIECE_BYTES // max(1, self._row_bytes)))
            self._read(rows * self._row_bytes)
            self._at += rows
        raw = self._read((stop - first) * self._row_bytes)
        self._at = stop
        return fit(np.frombuffer(raw, self.dtype).reshape(stop - first, *self.shape[1:]), spec)

    def _read(self, size: int) -> bytes:
        try:
            raw = self._stream.read(size)
        except (zipfile.BadZipFile, OSError) as error:
            raise ValueError(f"cannot be read ({error})") from None
        if len(raw) < size:
            raise ValueError("ends early; the file is damaged")
        return raw


class TrainingPictures:
    """Bytes of (height, width, channels) in an ``.npz``: as training on that file took them, see ``shoal.data.load``."""

    def __init__(self, column: ZippedColumn, spec: TensorSignature) -> None:
        self._column = column
        self._raw = TensorSignature(spec.name, "UINT8", (-1, *column.shape[1:]))
        self.shape = (column.shape[0], *row_shape(spec))

    @classmethod
    def fits(cls, column: ZippedColumn, spec: TensorSignature) -> bool:
        """Whether a column is such pictures, for an input that is them: (channels, height, width) as floats."""
        rows = (*column.shape[1:], 1) if len(column.shape) == 3 else column.shape[1:]
        moved = (*rows[2:], *rows[:2])
        return column.dtype == np.uint8 and spec.dtype.kind == "f" and is_picture(spec) and moved == row_shape(spec)

    def take(self, first: int, stop: int, spec: TensorSignature) -> np.ndarray:
        raw = self._column.take(first, stop, self._raw)
        return as_input(raw.reshape(stop - first, *raw.shape[1:3], -1), spec)
