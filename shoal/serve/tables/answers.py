"""Answers on their way out: as JSON lines, CSV, or arrays."""

from __future__ import annotations

import csv
import io
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec
import numpy as np

from shoal import tensorfile
from shoal.errors import RequestError
from shoal.serve.labels import probabilities
from shoal.serve.signature import ModelSignature, TensorSignature
from shoal.serve.tables.rows import floats, row_shape, row_size

_FILE, _LABEL, _SCORE = "file", "label", "score"
_PIECE_ROWS = 4096
_SAFETENSORS = MappingProxyType(
    {"BOOL": "BOOL", "UINT8": "U8", "INT8": "I8", "INT16": "I16", "INT32": "I32", "INT64": "I64", "FP16": "F16",
     "BF16": "BF16", "FP32": "F32", "FP64": "F64"}
)  # fmt: skip


@dataclass(frozen=True)
class Answers:
    """Rows of answers, an array for each output in the signature's order.

    Attributes:
        outputs: with as many rows each; those whose rows have lengths are padded.
        files: the file that each row comes from, where it has one.
        lengths: of each row, where rows have lengths.
    """

    outputs: Sequence[np.ndarray]
    files: Sequence[str] | None = None
    lengths: np.ndarray | None = None


class Format(ABC):
    """How answers are written."""

    @abstractmethod
    def head(self) -> bytes:
        """What the file begins with."""

    @abstractmethod
    def encode(self, answers: Answers) -> bytes:
        """Rows as they are appended."""

    def assemble(self, part: Path, rows: int) -> Path:
        """Return the finished file, beside the part: the part itself, unless a format needs another."""
        return part


class Labels:
    """The name of the class with the highest score, and the score: a probability.

    Where a row of scores is not one of probabilities already (none below 0, their sum 1), it is put through a softmax.
    """

    def __init__(self, labels: Sequence[str], place: int) -> None:
        self._labels = list(labels)
        self._place = place

    @classmethod
    def of(cls, signature: ModelSignature) -> Labels | None:
        """None where the bundle has no labels, or not exactly one output with a score for each of them."""
        if signature.labels is None:
            return None
        names = {spec.name for spec in signature.outputs}
        shape = (len(signature.labels),)
        fitting = [
            place for place, spec in enumerate(signature.outputs)
            if row_shape(spec) == shape and (spec.dtype.kind == "f" or spec.datatype == "BF16")
        ]  # fmt: skip
        clash = {_LABEL, _SCORE} & names
        return cls(signature.labels, fitting[0]) if len(fitting) == 1 and not clash else None

    def of_rows(self, outputs: Sequence[np.ndarray]) -> list[tuple[str | None, float | None]]:
        """(label, score) of each row of readable outputs; (None, None) where a score is not a number."""
        scores = outputs[self._place].astype(np.float64)
        best = scores.argmax(axis=1)
        found = probabilities(scores).max(axis=1)
        return [
            (self._labels[at], score) if np.isfinite(score) else (None, None)
            for at, score in zip(best.tolist(), found.tolist(), strict=True)
        ]


class JsonLines(Format):
    """An object a line: outputs by name, ``label`` and ``score`` where there are labels, ``file`` where rows are files."""

    def __init__(self, signature: ModelSignature) -> None:
        self._outputs = signature.outputs
        self._labels = Labels.of(signature)
        self._encoder = msgspec.json.Encoder()

    def head(self) -> bytes:
        return b""

    def objects(self, answers: Answers) -> list[dict[str, Any]]:
        """One object a row. What is not finite becomes null when it is encoded, for JSON has no other word."""
        readable = _readable(answers.outputs, self._outputs)
        names = [spec.name for spec in self._outputs]
        columns = [
            [row.tolist() for row in trimmed(array, answers.lengths)] if spec.free else array.tolist()
            for spec, array in zip(self._outputs, readable, strict=True)
        ]
        rows = [dict(zip(names, values, strict=True)) for values in zip(*columns, strict=True)]
        if self._labels is not None:
            for row, (label, score) in zip(rows, self._labels.of_rows(readable), strict=True):
                row[_LABEL], row[_SCORE] = label, score
        if answers.files is not None:
            rows = [{_FILE: file, **row} for file, row in zip(answers.files, rows, strict=True)]
        return rows

    def encode(self, answers: Answers) -> bytes:
        encoded: bytes = self._encoder.encode_lines(self.objects(answers))
        return encoded


class Csv(Format):
    """A column for each element of each output (``name``, or ``name_0``, ``name_1``, …), then ``label`` and ``score``."""

    def __init__(self, signature: ModelSignature, with_files: bool) -> None:
        self._outputs = signature.outputs
        self._labels = Labels.of(signature)
        self._with_files = with_files

    def head(self) -> bytes:
        names = [_FILE] if self._with_files else []
        for spec in self._outputs:
            names += [f"{spec.name}_{k}" for k in range(row_size(spec))] if row_shape(spec) else [spec.name]
        return _csv([names + ([_LABEL, _SCORE] if self._labels is not None else [])])

    def encode(self, answers: Answers) -> bytes:
        readable = _readable(answers.outputs, self._outputs)
        flat = [array.reshape(len(array), -1).tolist() for array in readable]
        rows = [[value for part in parts for value in part] for parts in zip(*flat, strict=True)]
        if self._labels is not None:
            rows = [row + list(found) for row, found in zip(rows, self._labels.of_rows(readable), strict=True)]
        if answers.files is not None:
            rows = [[file, *row] for file, row in zip(answers.files, rows, strict=True)]
        return _csv(rows)


class Records(Format):
    """Arrays. Rows are appended as bytes; the file that holds an array for each output is made of them at the end."""

    def __init__(self, signature: ModelSignature, write: Callable[[Path, Mapping[str, Any]], None]) -> None:
        self._outputs = signature.outputs
        self._write = write
        self._record = np.dtype([(str(k), spec.dtype, row_shape(spec)) for k, spec in enumerate(self._outputs)])

    def head(self) -> bytes:
        return b""

    def encode(self, answers: Answers) -> bytes:
        records = np.empty(len(answers.outputs[0]), self._record)
        for k, array in enumerate(answers.outputs):
            records[str(k)] = array
        return records.tobytes()

    def assemble(self, part: Path, rows: int) -> Path:
        records = np.memmap(part, self._record, mode="r", shape=(rows,))
        whole = part.with_name(part.name + ".whole")
        self._write(whole, {spec.name: (spec, records[str(k)]) for k, spec in enumerate(self._outputs)})
        return whole


def write_npz(path: Path, columns: Mapping[str, tuple[TensorSignature, np.ndarray]]) -> None:
    """Write arrays as NumPy's ``savez`` does, without having one whole in memory; BF16 becomes float32."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for name, (spec, column) in columns.items():
            dtype = floats(column[:1], spec).dtype
            with archive.open(f"{name}.npy", "w", force_zip64=True) as stream:
                header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": column.shape}
                np.lib.format.write_array_header_1_0(stream, header)
                for at in range(0, len(column), _PIECE_ROWS):
                    stream.write(floats(column[at : at + _PIECE_ROWS], spec).tobytes())


def write_safetensors(path: Path, columns: Mapping[str, tuple[TensorSignature, np.ndarray]]) -> None:
    """Write arrays as a safetensors file, piece by piece."""
    entries: dict[str, tensorfile.Entry] = {}
    at = 0
    for name, (spec, column) in columns.items():
        entries[name] = tensorfile.Entry(_SAFETENSORS[spec.datatype], column.shape, at, at + column.nbytes)
        at += column.nbytes
    with path.open("wb") as file:
        file.write(tensorfile.header(entries))
        for _, column in columns.values():
            for first in range(0, len(column), _PIECE_ROWS):
                file.write(column[first : first + _PIECE_ROWS].tobytes())


FORMATS = (".jsonl", ".csv", ".npz", ".safetensors")
"""The ends of names that say how a file of answers is written."""


def format_of(suffix: str, signature: ModelSignature, with_files: bool) -> Format:
    """Return what writes files that end so. ``with_files``: the rows come from files.

    RequestError where the format needs answers of one shape, and this model's have lengths of their own.
    """
    free = next((spec.name for spec in signature.outputs if spec.free), None)
    if free is not None and suffix != ".jsonl":
        raise RequestError(f"{free} of {signature.name} is as long as its row; give a .jsonl file for such answers.")
    if suffix == ".jsonl":
        return JsonLines(signature)
    if suffix == ".csv":
        return Csv(signature, with_files)
    return Records(signature, write_npz if suffix == ".npz" else write_safetensors)


def suffix_of(out: Path) -> str:
    """The format of a file of answers: ``.jsonl`` for a name without an end. RequestError for one that is unknown."""
    suffix = out.suffix.lower() or ".jsonl"
    if suffix not in FORMATS:
        raise RequestError(f"{out} ends in {out.suffix}; give a file that ends in {', '.join(FORMATS)}.")
    return suffix


def trimmed(array: np.ndarray, lengths: np.ndarray | None) -> list[np.ndarray]:
    """Rows without their padding."""
    assert lengths is not None
    return [row[:length] for row, length in zip(array, lengths, strict=True)]


def _readable(outputs: Sequence[np.ndarray], specs: Sequence[TensorSignature]) -> list[np.ndarray]:
    return [floats(array, spec) for array, spec in zip(outputs, specs, strict=True)]


def _csv(rows: Sequence[Sequence[Any]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()
