"""What goes into a model and what comes out: names, datatypes, shapes. No torch here: the gateway reads it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import numpy as np

from shoal.errors import TargetError
from shoal.serve.preprocess import Preprocess

DTYPES: Mapping[str, np.dtype[Any]] = MappingProxyType(
    {
        "BOOL": np.dtype("?"), "UINT8": np.dtype("u1"), "INT8": np.dtype("i1"), "INT16": np.dtype("<i2"),
        "INT32": np.dtype("<i4"), "INT64": np.dtype("<i8"), "FP16": np.dtype("<f2"), "FP32": np.dtype("<f4"),
        # NumPy has no bfloat16: the upper half of a float32's bits.
        "FP64": np.dtype("<f8"), "BF16": np.dtype("<u2"),
    }
)  # fmt: skip
"""The protocol's name of a datatype -> how its elements lie in memory. What torch has no type for is not here."""

PLATFORM = "shoal_pytorch"
CHANNELS = MappingProxyType({1: "L", 3: "RGB"})
"""How many numbers a pixel has -> what Pillow calls such pictures."""
UNIT = 8
"""Rows whose lengths are equal when rounded up to so many places share batches: the less they differ, the less is padding."""


@dataclass(frozen=True)
class TensorSignature:
    """One tensor: ``shape`` begins with -1 for the batch; a second -1 is a length that differs from request to request.

    Attributes:
        longest: the largest such length.
        padding: what fills up a row that is shorter than others in its batch.
        absent: what the whole input is where a client leaves it out; None where it may not.
        finite: whether NaN and infinite numbers are refused.
        pictures: how pictures become it; None where the bundle does not say.
    """

    name: str
    datatype: str
    shape: tuple[int, ...]
    longest: int | None = None
    padding: int = 0
    absent: int | None = None
    finite: bool = True
    pictures: Preprocess | None = field(default=None, compare=False)

    @property
    def dtype(self) -> np.dtype[Any]:
        """NumPy's type of an element; BF16 travels as the uint16 of its bits."""
        return DTYPES[self.datatype]

    @property
    def free(self) -> bool:
        """Whether rows have a length of their own."""
        return len(self.shape) > 1 and self.shape[1] < 0

    @property
    def row_shape(self) -> tuple[int, ...] | None:
        """The shape of the longest row; None where another dim than the second is free, or nobody says how long it may be."""
        if not self.shape or any(dim < 0 for dim in self.shape[2:]) or (self.free and self.longest is None):
            return None
        return (self.longest or 0, *self.shape[2:]) if self.free else self.shape[1:]

    @property
    def row_bytes(self) -> int | None:
        """Bytes of the longest row of the batch; None where that is not known."""
        shape = self.row_shape
        return None if shape is None else math.prod(shape) * self.dtype.itemsize

    def metadata(self) -> dict[str, Any]:
        """As the protocol describes it."""
        return {"name": self.name, "datatype": self.datatype, "shape": list(self.shape)}


@dataclass(frozen=True)
class ModelSignature:
    """A model as clients see it. ``labels``: names of the classes, or None.

    ``masked``: an input says which places of a row are padding, so rows of unequal lengths may share a batch. ``takes_texts``: a
    tokenizer makes its inputs of texts.
    """

    name: str
    inputs: tuple[TensorSignature, ...]
    outputs: tuple[TensorSignature, ...]
    labels: tuple[str, ...] | None = None
    version: str = "1"
    masked: bool = False
    takes_texts: bool = False

    @property
    def takes_pictures(self) -> bool:
        """Whether its one input is pictures."""
        return len(self.inputs) == 1 and layout_of(self.inputs[0]) is not None

    @property
    def encoded(self) -> dict[str, Any] | None:
        """What may be sent in place of its inputs: texts, or pictures as PNG, JPEG or WebP; None where there is nothing."""
        if not (self.takes_texts or self.takes_pictures):
            return None
        return {"name": "text" if self.takes_texts else "image", "datatype": "BYTES", "shape": [-1]}

    @property
    def longest(self) -> int | None:
        """The largest length of a row; None where all rows are of one shape."""
        lengths = [t.longest for t in (*self.inputs, *self.outputs) if t.free and t.longest is not None]
        return min(lengths) if lengths else None

    def units(self, length: int) -> int:
        """How much work a row of a length is, in units of ``UNIT`` places; 1 where all rows are of one shape."""
        return max(1, -(-length // UNIT))

    def key(self, length: int) -> int:
        """Rows whose keys are equal may share a batch."""
        return self.units(length) if self.masked else length

    @classmethod
    def from_description(cls, name: str, description: Mapping[str, Any]) -> ModelSignature:
        """From what bundle.json says. TargetError where that does not describe tensors."""
        labels = description.get("labels")
        inputs = _tensors(name, description.get("inputs") or ())
        return cls(
            name,
            _with_pictures(name, inputs, description.get("preprocess")),
            _tensors(name, description.get("outputs") or ()),
            tuple(str(label) for label in labels) if labels else None,
            masked=description.get("mask") is not None,
            takes_texts=description.get("tokenizer") is not None,
        )

    def metadata(self) -> dict[str, Any]:
        """The protocol's model metadata."""
        return {
            "name": self.name, "versions": [self.version], "platform": PLATFORM,
            "inputs": [tensor.metadata() for tensor in self.inputs],
            "outputs": [tensor.metadata() for tensor in self.outputs],
            **({} if self.encoded is None else {"alternative_inputs": [self.encoded]}),
        }  # fmt: skip


def layout_of(spec: TensorSignature) -> tuple[int, int, int, bool] | None:
    """(channels, height, width, channels first) of an input that is pictures, as floats or as bytes; None for any other."""
    shape = spec.shape[1:]
    if len(shape) != 3 or min(shape) < 1 or not (spec.dtype.kind == "f" or spec.datatype in ("BF16", "UINT8")):
        return None
    if shape[0] in CHANNELS:
        return shape[0], shape[1], shape[2], True
    return (shape[2], shape[0], shape[1], False) if shape[2] in CHANNELS else None


def _with_pictures(model: str, inputs: tuple[TensorSignature, ...], described: Any) -> tuple[TensorSignature, ...]:
    """The inputs, the one that is pictures knowing how pictures become it."""
    try:
        how = Preprocess.read(described)
        layout = layout_of(inputs[0]) if len(inputs) == 1 else None
        if how is None or layout is None:
            return inputs
        how.check(*layout[:3])
    except ValueError as error:
        raise TargetError(f"The bundle {model} cannot be served: {error}") from None
    return (replace(inputs[0], pictures=how),)


def _tensors(model: str, described: Iterable[Mapping[str, Any]]) -> tuple[TensorSignature, ...]:
    found = []
    for entry in described:
        try:
            longest, absent = entry.get("longest"), entry.get("absent")
            tensor = TensorSignature(
                str(entry["name"]), str(entry["dtype"]), tuple(int(dim) for dim in entry["shape"]),
                None if longest is None else int(longest), int(entry.get("padding", 0)),
                None if absent is None else int(absent), bool(entry.get("finite", True)),
            )  # fmt: skip
        except (KeyError, TypeError, ValueError):
            raise TargetError(
                f"The bundle {model} describes a tensor without name, dtype or shape; write it again."
            ) from None
        if tensor.datatype not in DTYPES:
            raise TargetError(
                f"{tensor.name} of {model} has the datatype {tensor.datatype}; shoal serves {', '.join(DTYPES)}."
            )
        found.append(tensor)
    return tuple(found)
