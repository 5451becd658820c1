"""What goes into a model and what comes out: names, datatypes, shapes. No torch here: the gateway reads it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np

from shoal.errors import TargetError

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


@dataclass(frozen=True)
class TensorSignature:
    """One tensor: ``shape`` begins with -1 for the batch; -1 elsewhere is a dim of any size."""

    name: str
    datatype: str
    shape: tuple[int, ...]

    @property
    def dtype(self) -> np.dtype[Any]:
        """NumPy's type of an element; BF16 travels as the uint16 of its bits."""
        return DTYPES[self.datatype]

    @property
    def row_bytes(self) -> int | None:
        """Bytes of one row of the batch; None where another dim is free."""
        if any(dim < 0 for dim in self.shape[1:]):
            return None
        return math.prod(self.shape[1:]) * self.dtype.itemsize

    def metadata(self) -> dict[str, Any]:
        """As the protocol describes it."""
        return {"name": self.name, "datatype": self.datatype, "shape": list(self.shape)}


@dataclass(frozen=True)
class ModelSignature:
    """A model as clients see it. ``labels``: names of the classes, or None."""

    name: str
    inputs: tuple[TensorSignature, ...]
    outputs: tuple[TensorSignature, ...]
    labels: tuple[str, ...] | None = None
    version: str = "1"

    @classmethod
    def from_description(cls, name: str, description: Mapping[str, Any]) -> ModelSignature:
        """From what bundle.json says. TargetError where that does not describe tensors."""
        labels = description.get("labels")
        return cls(
            name,
            _tensors(name, description.get("inputs") or ()),
            _tensors(name, description.get("outputs") or ()),
            tuple(str(label) for label in labels) if labels else None,
        )

    def metadata(self) -> dict[str, Any]:
        """The protocol's model metadata."""
        return {
            "name": self.name, "versions": [self.version], "platform": PLATFORM,
            "inputs": [tensor.metadata() for tensor in self.inputs],
            "outputs": [tensor.metadata() for tensor in self.outputs],
        }  # fmt: skip


def _tensors(model: str, described: Iterable[Mapping[str, Any]]) -> tuple[TensorSignature, ...]:
    found = []
    for entry in described:
        try:
            tensor = TensorSignature(str(entry["name"]), str(entry["dtype"]), tuple(int(dim) for dim in entry["shape"]))
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
