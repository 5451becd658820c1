"""CSV files, JSON lines and plain texts as rows. Files are read as streams: they may be larger than the memory."""

from __future__ import annotations

import csv
import hashlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from shoal.data.csv import long_fields, picture_in
from shoal.errors import DataError, did_you_mean
from shoal.serve.signature import TensorSignature
from shoal.serve.tables.pictures import is_picture, pixels
from shoal.serve.tables.rows import RowByRow, completed, fit, reshaped, row_size

Encode = Callable[[str], tuple[np.ndarray, ...]]
"""What makes a text to a row of a model, an array for each input."""

_IMAGE, _TEXT = "image", "text"
_TRUTH = {"true": True, "false": False, "1": True, "0": False}
_SHOWN = 40


class TextRows(RowByRow):
    """Rows of a text file. What marks them is the text itself, as far as it has been read: the rest may still change."""

    def __init__(self, path: Path, specs: Sequence[TensorSignature], encode: Encode | None = None) -> None:
        """``encode``: what makes texts to rows, where the model takes texts."""
        super().__init__(path.name, specs)
        self._path = path
        self._encode = encode
        try:
            self._file = path.open("rb")
            self._size = os.fstat(self._file.fileno()).st_size
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror}).") from None
        self._hash = hashlib.blake2b(digest_size=16)
        self._pending: list[bytes] = []
        self._passed_bytes = 0

    def lines(self) -> Iterator[str]:
        """The lines, with their ends; noted for the mark, which ``passed`` brings up to date."""
        first = True
        for raw in self._file:
            # The last line gets its end when more is appended; that makes no other line of it.
            self._pending.append(raw.rstrip(b"\r\n") + b"\n")
            self._passed_bytes += len(raw)
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError(f"{self.what} is not UTF-8 text ({error.reason}); save it in UTF-8.") from None
            yield text.removeprefix("\ufeff") if first else text
            first = False

    def encoded(self, text: Any, where: str) -> tuple[np.ndarray, ...]:
        """A text as a row; DataError where it is none."""
        assert self._encode is not None
        if not isinstance(text, str) or not text.strip():
            raise DataError(f"{where}: the text is empty, or none.")
        return self._encode(text)

    def passed(self) -> None:
        """All lines so far belong to rows that have been passed."""
        for line in self._pending:
            self._hash.update(line)
        self._pending.clear()

    @property
    def mark(self) -> str:
        return self._hash.hexdigest()

    @property
    def fraction(self) -> float | None:
        return self._passed_bytes / self._size if self._size else None

    def close(self) -> None:
        self._file.close()


class LineRows(TextRows):
    """A row a line: here a text for a model of texts. Empty lines are passed over."""

    def __init__(self, path: Path, specs: Sequence[TensorSignature], encode: Encode | None = None) -> None:
        super().__init__(path, specs, encode)
        if encode is None and type(self) is LineRows:
            raise DataError(f"{path} is text, and the model takes {_names(specs)} as numbers; give a .csv or a .jsonl.")
        self._number = 0
        self._texts = self._records()

    def _records(self) -> Iterator[str]:
        for line in self.lines():
            self._number += 1
            if not line.isspace():
                yield line

    def skip(self, rows: int) -> None:
        for _ in range(rows):
            if next(self._texts, None) is None:
                return
            self.passed()
            self.at += 1

    def next_row(self) -> tuple[np.ndarray, ...] | None:
        line = next(self._texts, None)
        if line is None:
            return None
        row = self.row_of(line, f"{self.what}, line {self._number}")
        self.passed()
        return row

    def row_of(self, line: str, where: str) -> tuple[np.ndarray, ...]:
        """The row that a line holds; DataError, beginning with ``where``, where it holds none."""
        return self.encoded(line.strip("\r\n"), where)


class JsonRows(LineRows):
    """JSON lines: an object with the inputs by name (others are passed over), or a bare value for a model with one input.

    For a model of texts also ``text``, or the bare text.
    """

    def row_of(self, line: str, where: str) -> tuple[np.ndarray, ...]:
        try:
            value = msgspec.json.decode(line)
        except (msgspec.DecodeError, RecursionError) as error:
            raise DataError(f"{where}: it is not valid JSON ({str(error).rstrip('.')}).") from None
        if self._encode is not None:
            if isinstance(value, str):
                return self.encoded(value, where)
            if isinstance(value, dict) and _TEXT in value and self.specs[0].name not in value:
                return self.encoded(value[_TEXT], where)
        row = [
            None if isinstance(value, dict) and spec.name not in value and spec.absent is not None
            else _from_json(self._value(value, spec, where), spec, where)
            for spec in self.specs
        ]  # fmt: skip
        return completed(row, self.specs, where)

    def _value(self, value: Any, spec: TensorSignature, where: str) -> Any:
        if isinstance(value, dict):
            if spec.name in value:
                return value[spec.name]
            near = did_you_mean(spec.name, value)
            raise DataError(f'{where}: there is no input "{spec.name}".{near} The model takes {_names(self.specs)}.')
        if len(self.specs) > 1:
            raise DataError(f"{where}: it is no object; the model takes {_names(self.specs)} by name.")
        return value


class CsvRows(TextRows):
    """CSV with a header: a column for an input of one element a row, else ``name_0``, ``name_1``, … or a JSON list in ``name``.

    A picture may come in a column ``image``, as a path or in base64, as ``shoal train --data`` takes it; a text in ``text``.
    """

    def __init__(self, path: Path, specs: Sequence[TensorSignature], encode: Encode | None = None) -> None:
        super().__init__(path, specs, encode)
        self._reader = csv.reader(self.lines(), strict=True)
        self._number = 0
        header = [name.strip() for name in self._record() or []]
        self._width = len(header)
        if not header:
            raise DataError(f"{self.what} has no header; its first row must name the columns.")
        self._text_at = None
        if encode is not None and _TEXT in header and self.specs[0].name not in header:
            self._text_at = header.index(_TEXT)
            return
        self._columns = [
            None if spec.absent is not None and spec.name not in header else _Column(spec, header, self.specs, self.what)
            for spec in self.specs
        ]

    def where(self, first: int, count: int) -> str:
        return f"{super().where(first, count)} (not counting the header)"

    def _record(self) -> list[str] | None:
        """The next row that is not empty."""
        try:
            with long_fields():
                for cells in self._reader:
                    self._number += 1
                    if cells:
                        return cells
        except csv.Error as error:
            raise DataError(f"{self.what}, row {self._number + 1}: it cannot be read as CSV ({error}).") from None
        return None

    def skip(self, rows: int) -> None:
        for _ in range(rows):
            if self._record() is None:
                return
            self.passed()
            self.at += 1

    def next_row(self) -> tuple[np.ndarray, ...] | None:
        cells = self._record()
        if cells is None:
            return None
        where = f"{self.what}, row {self._number}"
        if len(cells) != self._width:
            raise DataError(f"{where}: it has {len(cells)} cells where the header has {self._width}.")
        if self._text_at is not None:
            row = self.encoded(cells[self._text_at], where)
        else:
            folder = self._path.parent
            given = [None if column is None else column.read(cells, where, folder) for column in self._columns]
            row = completed(given, self.specs, where)
        self.passed()
        return row


class _Column:
    """Where in a row one input is, and how it is written there."""

    def __init__(self, spec: TensorSignature, header: list[str], specs: Sequence[TensorSignature], what: str) -> None:
        self._spec = spec
        self._header = header
        names = [spec.name] if spec.free else [f"{spec.name}_{k}" for k in range(row_size(spec))]
        self._is_image = False
        if spec.name in header:
            names = [spec.name]
        elif names[0] not in header and _IMAGE in header and len(specs) == 1 and is_picture(spec):
            names, self._is_image = [_IMAGE], True
        at = {name: place for place, name in enumerate(header)}
        missing = next((name for name in names if name not in at), None)
        if missing is not None:
            raise DataError(_no_column(missing, spec, header, what))
        twice = next((name for name in names if header.count(name) > 1), None) if len(at) < len(header) else None
        if twice is not None:
            raise DataError(f'{what} has two columns "{twice}"; rename one.')
        self._at = [at[name] for name in names]
        self._is_list = names == [spec.name] and not self._is_image

    def read(self, cells: list[str], where: str, folder: Path) -> np.ndarray:
        """One row of the input; DataError where the cells hold none."""
        if self._is_image:
            return pixels(picture_in(cells[self._at[0]].strip(), where, folder), self._spec)
        if self._is_list and (self._spec.free or row_size(self._spec) != 1 or cells[self._at[0]].lstrip().startswith("[")):
            return self._from_list(cells[self._at[0]], where)
        given = [cells[place] for place in self._at]
        try:
            values = self._numbers(given)
        except ValueError:
            bad = next(k for k, cell in enumerate(given) if not self._is_number(cell))
            name = self._header[self._at[bad]]
            raise DataError(f'{where}: {name} is "{given[bad][:_SHOWN]}", which is no number.') from None
        return _fitted(values, self._spec, where)

    def _from_list(self, cell: str, where: str) -> np.ndarray:
        try:
            value = msgspec.json.decode(cell)
        except (msgspec.DecodeError, RecursionError):
            raise DataError(f'{where}: {self._spec.name} is "{cell[:_SHOWN]}", which is no JSON list.') from None
        return _from_json(value, self._spec, where)

    def _numbers(self, cells: list[str]) -> np.ndarray:
        kind = self._spec.dtype.kind
        if kind == "b":
            return np.array([self._truth(cell) for cell in cells])
        if kind == "f" or self._spec.datatype == "BF16":
            return np.array([float(cell) for cell in cells])
        try:
            return np.array([int(cell) for cell in cells])
        except ValueError:
            return np.array([float(cell) for cell in cells])

    def _is_number(self, cell: str) -> bool:
        try:
            self._numbers([cell])
        except ValueError:
            return False
        return True

    @staticmethod
    def _truth(cell: str) -> bool:
        found = _TRUTH.get(cell.strip().lower())
        if found is None:
            raise ValueError
        return found


def _from_json(value: Any, spec: TensorSignature, where: str) -> np.ndarray:
    try:
        values = np.array(value)
    except (ValueError, TypeError, OverflowError):
        raise DataError(f"{where}: {spec.name} has lists of unequal lengths.") from None
    return _fitted(values, spec, where)


def _fitted(values: np.ndarray, spec: TensorSignature, where: str) -> np.ndarray:
    try:
        return fit(reshaped(values, spec), spec)
    except ValueError as error:
        raise DataError(f"{where}: {spec.name} {error}.") from None


def _names(specs: Sequence[TensorSignature]) -> str:
    return ", ".join(spec.name for spec in specs)


def _no_column(missing: str, spec: TensorSignature, header: list[str], what: str) -> str:
    size = row_size(spec)
    if spec.free:
        return f'{what} has no column "{spec.name}" with JSON lists (there is {", ".join(header)[:200]}).'
    if missing != f"{spec.name}_0":
        return f'{what} has no column "{missing}", and {spec.name} has {size} numbers a row.'
    if size == 1:
        wanted = f'a column "{spec.name}"'
    else:
        wanted = f'columns "{spec.name}_0" to "{spec.name}_{size - 1}", or one column "{spec.name}" with JSON lists'
    if is_picture(spec):
        wanted += f', or a column "{_IMAGE}" with paths'
    found = ", ".join(header)
    return f"{what} has no column for the input {spec.name}; give {wanted} (there is {found[:200]})."


class TextList(RowByRow):
    """Texts from the caller's memory."""

    def __init__(self, texts: Sequence[str], specs: Sequence[TensorSignature], encode: Encode) -> None:
        super().__init__("data", specs, len(texts))
        self._texts = list(texts)
        self._encode = encode
        self._hash = hashlib.blake2b(digest_size=16)
        self._next = 0

    def next_row(self) -> tuple[np.ndarray, ...] | None:
        if self._next == len(self._texts):
            return None
        text = self._texts[self._next]
        if not text.strip():
            raise DataError(f"{self.where(self._next, 1)}: the text is empty.")
        self._pass()
        return self._encode(text)

    def _pass(self) -> None:
        self._hash.update(self._texts[self._next].encode(errors="surrogatepass") + b"\0")
        self._next += 1

    def skip(self, rows: int) -> None:
        for _ in range(min(rows, len(self._texts) - self._next)):
            self._pass()
            self.at += 1

    @property
    def mark(self) -> str:
        return self._hash.hexdigest()
