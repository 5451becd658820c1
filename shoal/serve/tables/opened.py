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
TextOpener = Callable[[Path, Sequence[TensorSignature], "text.Encode | None"], Rows]

BY_SUFFIX: Mapping[str, Opener] = MappingProxyType(
    {
        ".npy": tensors.npy, ".npz": tensors.npz, ".safetensors": tensors.safetensors, ".pt": tensors.pt, ".pth": tensors.pt,
    }
)  # fmt: skip
"""How a file of tensors is read, by the end of its name."""

TEXT_BY_SUFFIX: Mapping[str, TextOpener] = MappingProxyType(
    {".csv": text.CsvRows, ".jsonl": text.JsonRows, ".ndjson": text.JsonRows, ".txt": text.LineRows}
)
"""How a file of text is read."""

NAMED: Mapping[str, str] = MappingProxyType({"cifar10": "shoal.data.cifar10"})
"""Data sets that have a name: the module whose ``load(say)`` has them; the test samples are taken."""


def open_rows(
    data: Any, specs: Sequence[TensorSignature], marked: bool, say: Callable[[str], None],
    encode: text.Encode | None = None,
) -> Rows:  # fmt: skip
    """Open a data set.

    Args:
        data: a path, a name of ``NAMED``, or what ``tensors.in_memory`` takes.
        specs: the model's inputs.
        marked: whether the rows' ``mark`` will be asked for.
        say: gets a line now and then while a named data set is fetched.
        encode: what makes texts to rows, where the model takes texts.

    Raises DataError where there is nothing of the kind, it is damaged, or it does not fit the model.
    """
    if not isinstance(data, (str, os.PathLike)):
        if encode is not None and isinstance(data, (list, tuple)) and data and all(isinstance(t, str) for t in data):
            return text.TextList(data, specs, encode)
        return tensors.in_memory(data, specs, marked)
    path = Path(data)
    if path.is_dir():
        return FolderRows(path, tuple(specs))
    if not path.exists():
        if str(data) in NAMED:
            return tensors.SourceRows(str(data), importlib.import_module(NAMED[str(data)]).load(say).test(), specs)
        raise DataError(f"There is no data at {data}.{did_you_mean(str(data), NAMED)} Give {_kinds()}.")
    suffix = path.suffix.lower()
    if suffix in TEXT_BY_SUFFIX and path.is_file():
        return TEXT_BY_SUFFIX[suffix](path, specs, encode)
    if suffix in BY_SUFFIX and path.is_file():
        return BY_SUFFIX[suffix](path, specs)
    raise DataError(f"{data} is no known kind of data; give {_kinds()}.")


def _kinds() -> str:
    return f"a {', '.join([*TEXT_BY_SUFFIX, *BY_SUFFIX])} file, a folder of pictures, or {' or '.join(NAMED)}"
