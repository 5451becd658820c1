"""A data set as a stream of rows for one model, and how values become what the model takes."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence

import numpy as np

from shoal.errors import DataError, TargetError
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

    def __init__(self, what: str, total: int | None = None) -> None:
        super().__init__(what, total)
        self._error: DataError | None = None

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
        return tuple(np.stack(column) for column in zip(*rows, strict=True)) if rows else None


def row_shape(spec: TensorSignature) -> tuple[int, ...]:
    """The shape of one row."""
    return spec.shape[1:]


def row_size(spec: TensorSignature) -> int:
    """How many elements one row has."""
    return math.prod(spec.shape[1:])


def reshaped(values: np.ndarray, spec: TensorSignature) -> np.ndarray:
    """Return one row in its shape, from that shape or from a flat list. ValueError where it has neither."""
    shape = row_shape(spec)
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


def check_fixed(specs: Sequence[TensorSignature], model: str) -> None:
    """TargetError where a row of a tensor has no fixed size."""
    for spec in specs:
        if spec.row_bytes is None:
            raise TargetError(
                f"{spec.name} of {model} has the shape {list(spec.shape)}; "
                "shoal predict takes tensors whose first dim alone is free so far."
            )
