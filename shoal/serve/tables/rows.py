"""A data set as a stream of rows for one model, and how values become what the model takes."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from shoal.errors import DataError
from shoal.serve.signature import TensorSignature

_BF16_NAN = np.uint16(0x7FC0)


class Rows(ABC):
    """Rows, read once from the first to the last. Whoever opened it closes it.

    Attributes:
        what: how errors name the data, such as "data.csv".
        total: how many rows there are; None where only reading to the end would tell.
        at: how many have been read or skipped.
    """

    def __init__(self, what: str, total: int | None = None) -> None:
        self.what = what
        self.total = total
        self.at = 0

    @abstractmethod
    def read(self, most: int) -> tuple[np.ndarray, ...] | None:
        """Return the next rows, ``most`` at the most: an array for each input, in the signature's order. None at the end.

        DataError for a row that makes no sense; the rows before it have been returned by then.
        """

    @abstractmethod
    def skip(self, rows: int) -> None:
        """Go past rows without looking into them; past the end nothing happens."""

    @property
    @abstractmethod
    def mark(self) -> str:
        """What tells the rows from the first to ``at`` from those of other data."""

    @property
    def fraction(self) -> float | None:
        """The part of the data that has been read or skipped, 0 to 1; None where nobody knows."""
        return self.at / self.total if self.total else None

    def lengths(self) -> np.ndarray | None:
        """Of the last rows read, how long each is; None where all rows are of one shape. What is behind that is padding."""
        return None

    def files(self) -> list[str] | None:
        """The names of the files that the last rows read came from, where each row has one of its own."""
        return None

    def where(self, first: int, count: int) -> str:
        """Name rows in an error; ``first`` counts from 0, the words from 1."""
        rows = f"row {first + 1:,}" if count == 1 else f"rows {first + 1:,} to {first + count:,}"
        return f"{rows} of {self.what}"

    def close(self) -> None:
        """Let go of the files."""
        return


class RowByRow(Rows):
    """Rows that are made one after the other: a bad one ends the stream behind those before it."""

    def __init__(self, what: str, specs: Sequence[TensorSignature], total: int | None = None) -> None:
        super().__init__(what, total)
        self.specs = tuple(specs)
        self._error: DataError | None = None
        self._lengths: np.ndarray | None = None

    @abstractmethod
    def next_row(self) -> tuple[np.ndarray, ...] | None:
        """Return the next row, an array for each input; None at the end; DataError where it makes no sense."""

    def read(self, most: int) -> tuple[np.ndarray, ...] | None:
        if self._error is not None:
            raise self._error
        rows: list[tuple[np.ndarray, ...]] = []
        try:
            while len(rows) < most and (row := self.next_row()) is not None:
                rows.append(row)
        except DataError as error:
            if not rows:
                raise
            self._error = error
        self.at += len(rows)
        if not rows:
            return None
        found = [_stacked(column, spec) for column, spec in zip(zip(*rows, strict=True), self.specs, strict=True)]
        if any(spec.free for spec in self.specs):
            self._lengths = np.array([length_of(row, self.specs) for row in rows], np.int32)
        return tuple(found)

    def lengths(self) -> np.ndarray | None:
        return self._lengths


def _stacked(values: Sequence[np.ndarray], spec: TensorSignature) -> np.ndarray:
    """Rows as one array, padded to the longest."""
    if not spec.free:
        return np.stack(values)
    found = np.full((len(values), max(map(len, values)), *spec.shape[2:]), spec.padding, spec.dtype)
    for place, value in zip(found, values, strict=True):
        place[: len(value)] = value
    return found


def length_of(row: Sequence[np.ndarray], specs: Sequence[TensorSignature]) -> int:
    """The length of a row, 0 where it has none of its own."""
    return next((len(value) for value, spec in zip(row, specs, strict=True) if spec.free), 0)


def completed(row: Sequence[np.ndarray | None], specs: Sequence[TensorSignature], where: str) -> tuple[np.ndarray, ...]:
    """Return a row with what it may leave out (None) filled in. DataError where its lengths make no sense."""
    lengths = {len(value): spec for value, spec in zip(row, specs, strict=True) if spec.free and value is not None}
    if len(lengths) > 1:
        raise DataError(f"{where}: its inputs have unequal lengths ({', '.join(map(str, sorted(lengths)))}).")
    for length, spec in lengths.items():
        if not 0 < length <= (spec.longest or length):
            raise DataError(f"{where}: {spec.name} is {length} long, and the model takes 1 to {spec.longest}.")
    length = next(iter(lengths), 1)
    shapes = ((length, *spec.shape[2:]) if spec.free else spec.shape[1:] for spec in specs)
    return tuple(
        np.full(shape, spec.absent, spec.dtype) if value is None else value
        for value, spec, shape in zip(row, specs, shapes, strict=True)
    )


def row_shape(spec: TensorSignature) -> tuple[int, ...]:
    """The shape of one row; -1 where it has a length of its own."""
    return spec.shape[1:]


def row_size(spec: TensorSignature) -> int:
    """How many elements one row has, where all have as many."""
    return math.prod(spec.shape[1:])


def reshaped(values: np.ndarray, spec: TensorSignature) -> np.ndarray:
    """Return one row in its shape, from that shape or from a flat list. ValueError where it has neither."""
    shape = row_shape(spec)
    if spec.free:
        if values.ndim != len(shape) or values.shape[1:] != shape[1:]:
            raise ValueError(f"has the shape {list(values.shape)} where the model takes {list(shape)}, -1 being its length")
        return values
    if values.shape not in (shape, (row_size(spec),)):
        raise ValueError(f"has the shape {list(values.shape)} where the model takes {list(shape)}")
    return values.reshape(shape)


def fit(values: np.ndarray, spec: TensorSignature) -> np.ndarray:
    """Return values as the model's datatype, where nothing is lost but the last digits of a fraction; BF16 as its bits.

    ValueError, as the end of a sentence that begins with what holds the values, where something would be lost.
    """
    kind, wanted = values.dtype.kind, spec.dtype
    if kind not in "biuf":
        raise ValueError(f"does not hold numbers, and the model takes {spec.datatype}")
    if spec.datatype == "BF16":
        return bfloat16_bits(_finite_stay_finite(values, np.dtype("<f4"), spec))
    if values.dtype == wanted:
        return values
    if wanted.kind == "f":
        return _finite_stay_finite(values, wanted, spec)
    if values.size == 0 or kind == "b":
        return values.astype(wanted)
    if kind == "f" and not (np.isfinite(values).all() and (values == np.trunc(values)).all()):
        raise ValueError(f"has a fraction where the model takes whole numbers ({spec.datatype})")
    low, high = (0, 1) if wanted.kind == "b" else (int(np.iinfo(wanted).min), int(np.iinfo(wanted).max))
    if int(values.min()) < low or int(values.max()) > high:
        raise ValueError(f"has a number outside {low} to {high}, the range of {spec.datatype}")
    return values.astype(wanted)


def _finite_stay_finite(values: np.ndarray, wanted: np.dtype, spec: TensorSignature) -> np.ndarray:
    with np.errstate(over="ignore"):
        cast = values.astype(wanted)
    if values.dtype.kind == "f" and values.dtype.itemsize <= wanted.itemsize:
        return cast
    if not np.array_equal(np.isfinite(values), np.isfinite(cast)):
        raise ValueError(f"has a number beyond what {spec.datatype} holds")
    return cast


def bfloat16_bits(values: np.ndarray) -> np.ndarray:
    """The bits of float32 values as bfloat16, rounded to the nearest (ties to even) as torch does."""
    bits = np.ascontiguousarray(values, "<f4").view("<u4")
    rounded: np.ndarray = ((bits + (((bits >> 16) & 1) + 0x7FFF)) >> 16).astype("<u2")
    rounded[np.isnan(values)] = _BF16_NAN
    return rounded.reshape(values.shape)


def floats(values: np.ndarray, spec: TensorSignature) -> np.ndarray:
    """Values as numbers that NumPy can read: BF16, which it has no type for, as float32."""
    if spec.datatype != "BF16":
        return values
    widened: np.ndarray = (values.astype("<u4") << 16).view("<f4")
    return widened
