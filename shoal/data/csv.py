"""A CSV file with a column of pictures (paths or base64) and a column of labels."""

from __future__ import annotations

import base64
import binascii
import contextlib
import csv as csv_format
import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from shoal.data.arrays import Images
from shoal.data.pictures import IN_MEMORY_MB, Picture, read_pictures
from shoal.errors import DataError, did_you_mean

_LARGEST_CLASS = 1_000_000
_LONGEST_PATH = 4096
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?|nan|[+-]?inf(inity)?", re.IGNORECASE)
_PICTURE_STARTS = (
    *(b"\x89PNG", b"\xff\xd8\xff", b"GIF8", b"BM", b"RIFF", b"II*\x00", b"MM\x00*"),
    *(b"P4", b"P5", b"P6", b"\x00\x00\x00\x0cjP"),
)
_DATA_URL = re.compile(r"data:image/[^,;]+;base64,")


def csv(
    path: str | os.PathLike[str],
    image: str = "image",
    label: str = "label",
    size: int | tuple[int, int] | None = None,
    *,
    classes: Sequence[str] | None = None,
    in_memory_mb: int = IN_MEMORY_MB,
) -> Images:
    """Open a CSV file (UTF-8, commas, a header) as a data set of pictures.

    Args:
        path: the file. Rows are counted as in the file: the header is row 1.
        image: the column with each picture: a path, relative to the CSV file's folder, or base64 of a picture file.
        label: the column with each class: whole numbers from 0, or names, which are sorted to become classes.
        size: (height, width) or one number for both, to which all pictures are resized; None: the first one's.
        classes: the classes of the training data (its ``.classes``), so that evaluation data gets the same
            numbers; labels are then these names or their numbers.
        in_memory_mb: where all pictures together take more than this when decoded, they are decoded batch by batch.

    Raises DataError, naming the file and the row: a column that is missing, a row that is not complete, a picture
    that is missing or damaged, a label that is no class.
    """
    file = Path(path)
    rows = _read_rows(file, image, label)
    labels, names = _classify(rows, classes)
    pictures = [picture_in(row.image, row.where, file.parent) for row in rows]
    return Images(read_pictures(pictures, size, in_memory_mb), labels, names, resized=True)


@dataclass(frozen=True)
class _Row:
    where: str
    image: str
    label: str


def _read_rows(file: Path, image: str, label: str) -> list[_Row]:
    try:
        with file.open(newline="", encoding="utf-8-sig") as stream, long_fields():
            return list(_rows(csv_format.reader(stream), file, image, label))
    except FileNotFoundError:
        raise DataError(f"There is no file {file}.") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{file} is not UTF-8 text ({error.reason}); save it as CSV in UTF-8.") from None
    except (OSError, csv_format.Error) as error:
        raise DataError(f"{file} cannot be read as CSV ({error}).") from None


def _rows(reader: Iterator[list[str]], file: Path, image: str, label: str) -> Iterator[_Row]:
    header = [name.strip() for name in next(reader, [])]
    for column in (image, label):
        if column not in header:
            found = ", ".join(header) or "none"
            raise DataError(
                f'{file}, row 1: there is no column "{column}"; the columns are {found}.{did_you_mean(column, header)}'
            )
    image_at, label_at = header.index(image), header.index(label)
    empty = True
    for number, cells in enumerate(reader, start=2):
        if not cells:
            continue
        empty = False
        where = f"{file}, row {number}"
        if len(cells) != len(header):
            raise DataError(f"{where}: it has {len(cells)} cells where the header has {len(header)}.")
        yield _Row(where, cells[image_at].strip(), cells[label_at].strip())
    if empty:
        raise DataError(f"{file} has a header but no rows; add some.")


@contextlib.contextmanager
def long_fields() -> Iterator[None]:
    """Let fields be longer than Python's 128 KiB, as base64 pictures are, for as long as one file is read."""
    before = csv_format.field_size_limit(min(sys.maxsize, 2**31 - 1))
    try:
        yield
    finally:
        csv_format.field_size_limit(before)


def picture_in(text: str, where: str, folder: Path) -> Picture:
    """Return the picture that a cell names: a path relative to ``folder``, or base64. DataError, beginning with ``where``."""
    if not text:
        raise DataError(f"{where}: the image is empty; give a path or base64.")
    if len(text) <= _LONGEST_PATH:
        # A name too long for the file system or with a forbidden character is no path; it may be base64.
        with contextlib.suppress(OSError, ValueError):
            if (folder / text).is_file():
                return Picture(folder / text, where)
    try:
        content = base64.b64decode(_DATA_URL.sub("", "".join(text.split()), count=1), validate=True)
    except (binascii.Error, ValueError):
        content = b""
    # A missing file whose name happens to be valid base64 gives a few odd bytes, never the start of a picture.
    if not _looks_like_picture(content):
        shown = text if len(text) <= 60 else text[:57] + "..."
        raise DataError(f'{where}: "{shown}" is neither a file beside the CSV file nor base64 of a picture.')
    return Picture(content, where)


def _looks_like_picture(content: bytes) -> bool:
    return len(content) > 10 and content.startswith(_PICTURE_STARTS)


def _classify(rows: Sequence[_Row], classes: Sequence[str] | None) -> tuple[NDArray[np.int64], tuple[str, ...]]:
    """Return the class number of each row, and the classes' names."""
    if classes is not None:
        known = {str(name): number for number, name in enumerate(classes)}
        return np.array([_known_class(row, known) for row in rows], dtype=np.int64), tuple(known)
    by_number = _is_number(rows[0].label)
    for row in rows:
        if _is_number(row.label):
            _class_number(row)
        if not row.label or _is_number(row.label) != by_number:
            others = "whole numbers" if by_number else "names"
            what = f'the label "{row.label}" is no class: the labels before it are {others}'
            raise DataError(f"{row.where}: {what if row.label else 'the label is empty; give a class'}.")
    if by_number:
        numbers = [_class_number(row) for row in rows]
        return np.array(numbers, dtype=np.int64), tuple(str(number) for number in range(max(numbers) + 1))
    names = sorted({row.label for row in rows})
    number_of = {name: number for number, name in enumerate(names)}
    return np.array([number_of[row.label] for row in rows], dtype=np.int64), tuple(names)


def _is_number(label: str) -> bool:
    return _NUMBER.fullmatch(label) is not None


def _class_number(row: _Row) -> int:
    number = _whole_number(row.label)
    if number is None or number >= _LARGEST_CLASS:
        raise DataError(
            f'{row.where}: the label "{row.label}" is no class; give a whole number from 0 '
            f"(below {_LARGEST_CLASS:,}) or a name."
        )
    return number


def _whole_number(label: str) -> int | None:
    # Python refuses to convert very long digit strings, and no class has so long a number.
    return int(label) if label.isascii() and label.isdigit() and len(label) < 20 else None


def _known_class(row: _Row, known: dict[str, int]) -> int:
    if row.label in known:
        return known[row.label]
    number = _whole_number(row.label)
    if number is not None and number < len(known):
        return number
    hint = did_you_mean(row.label, known)
    raise DataError(f'{row.where}: the label "{row.label}" is none of the {len(known)} known classes.{hint}')
