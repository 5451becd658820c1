"""One entry for ``--data PATH``: what lies at the path decides how it is read."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from shoal.data.arrays import ArrayDataset, Images
from shoal.data.csv import csv
from shoal.data.folder import folder
from shoal.errors import DataError


def load(
    path: str | os.PathLike[str],
    size: int | tuple[int, int] | None = None,
    *,
    classes: Sequence[str] | None = None,
) -> Images | ArrayDataset:
    """Open a data set: a ``.csv`` file, a folder of class folders, or an ``.npz`` file with arrays ``x`` and ``y``.

    Args:
        path: where it is.
        size, classes: as in ``csv`` and ``folder``; an ``.npz`` file is taken as it is.

    Returns ``Images``, also for an ``.npz`` whose x is uint8 (n, height, width, 1 or 3) or (n, height, width) with
    whole numbers from 0 in y; else ``ArrayDataset``. Raises DataError where the path is none of these or cannot be
    read.
    """
    where = Path(path)
    if where.is_dir():
        return folder(where, size, classes=classes)
    if not where.exists():
        raise DataError(f"There is no data at {where}; give a .csv file, a folder of class folders, or an .npz file.")
    if where.suffix.lower() == ".csv":
        return csv(where, size=size, classes=classes)
    if where.suffix.lower() == ".npz":
        return _npz(where, classes)
    raise DataError(f"{where} is no known kind of data set; give a .csv, an .npz, or a folder of class folders.")


def _npz(path: Path, classes: Sequence[str] | None) -> Images | ArrayDataset:
    try:
        # allow_pickle=False: an array file must not be able to run code.
        with np.load(path, allow_pickle=False) as arrays:
            missing = [name for name in ("x", "y") if name not in arrays.files]
            if missing:
                found = ", ".join(arrays.files) or "none"
                raise DataError(f'{path} has no array "{missing[0]}"; it must hold x and y, and it holds {found}.')
            x, y = arrays["x"], arrays["y"]
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"{path} cannot be read as arrays ({error}).") from None
    if x.ndim == 0 or y.ndim == 0 or len(x) != len(y) or not len(x):
        raise DataError(f"{path}: x has the shape {x.shape} and y {y.shape}; both must begin with the same length.")
    for name, array in (("x", x), ("y", y)):
        if array.dtype.kind not in "biuf":
            raise DataError(f"{path}: {name} holds {array.dtype}; it must hold numbers.")
    labels = y[:, 0] if y.ndim == 2 and y.shape[1] == 1 else y
    pictures = x[..., np.newaxis] if x.ndim == 3 else x
    is_pictures = x.dtype == np.uint8 and pictures.ndim == 4 and pictures.shape[3] in (1, 3)
    if not (is_pictures and labels.ndim == 1 and labels.dtype.kind in "iu" and labels.min() >= 0):
        return ArrayDataset(x, y)
    try:
        return Images(pictures, labels, classes or [str(number) for number in range(int(labels.max()) + 1)])
    except DataError as error:
        raise DataError(f"{path}: {error}") from None
