"""What ``shoal predict`` takes as data, and how each kind is opened."""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from shoal.errors import DataError, did_you_mean
from shoal.serve.signature import TensorSignature
from shoal.serve.tables import tensors, text
from shoal.serve.tables.pictures import FolderRows
from shoal.serve.tables.rows import Rows

Opener = Callable[[Path, Sequence[TensorSignature]], Rows]

BY_SUFFIX: Mapping[str, Opener] = MappingProxyType(
    {
        ".csv": text.CsvRows, ".jsonl": text.JsonRows, ".ndjson": text.JsonRows, ".npy": tensors.npy,
        ".npz": tensors.npz, ".safetensors": tensors.safetensors, ".pt": tensors.pt, ".pth": tensors.pt,
    }
)  # fmt: skip
"""How a file is read, by the end of its name."""

NAMED: Mapping[str, str] = MappingProxyType({"cifar10": "shoal.data.cifar10"})
"""Data sets that have a name: the module whose ``load(say)`` has them; the test samples are taken."""


def open_rows(data: Any, specs: Sequence[TensorSignature], marked: bool, say: Callable[[str], None]) -> Rows:
    """Open a data set.

    Args:
        data: a path, a name of ``NAMED``, or what ``tensors.in_memory`` takes.
        specs: the model's inputs.
        marked: whether the rows' ``mark`` will be asked for.
        say: gets a line now and then while a named data set is fetched.

    Raises DataError where there is nothing of the kind, it is damaged, or it does not fit the model.
    """
    if not isinstance(data, (str, os.PathLike)):
        return tensors.in_memory(data, specs, marked)
    path = Path(data)
    if path.is_dir():
        return FolderRows(path, tuple(specs))
    if not path.exists():
        if str(data) in NAMED:
            return tensors.SourceRows(str(data), importlib.import_module(NAMED[str(data)]).load(say).test(), specs)
        raise DataError(f"There is no data at {data}.{did_you_mean(str(data), NAMED)} Give {_kinds()}.")
    opener = BY_SUFFIX.get(path.suffix.lower())
    if opener is None or not path.is_file():
        raise DataError(f"{data} is no known kind of data; give {_kinds()}.")
    return opener(path, specs)


def _kinds() -> str:
    return f"a {', '.join(BY_SUFFIX)} file, a folder of pictures, or {' or '.join(NAMED)}"
