"""What makes a message smaller: codecs that a tensor goes through on its way to another process.

A codec is named in the message, so the two ends need not have agreed beforehand. To add one is to add a class and a line.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch

from shoal.errors import PlanError, did_you_mean


class Codec(Protocol):
    """How a tensor becomes bytes, and a tensor again.

    ``encode`` may return a view of what it is given: the caller leaves it alone until the message has arrived. ``decode`` may
    return a view of the bytes; it raises ValueError where they are not what ``numel`` numbers of that dtype would become.
    """

    name: str

    def encode(self, tensor: torch.Tensor) -> memoryview: ...
    def decode(self, data: memoryview, numel: int, dtype: torch.dtype) -> torch.Tensor: ...


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a contiguous tensor, without copying."""
    raw: Any = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return memoryview(raw)


def tensor_of(data: memoryview, numel: int, dtype: torch.dtype) -> torch.Tensor:
    """Bytes as a 1-D tensor, without copying; ValueError where there are more or fewer than it takes."""
    if data.nbytes != numel * dtype.itemsize:
        raise ValueError(f"{data.nbytes} bytes where {numel} numbers of {dtype} take {numel * dtype.itemsize}")
    if not numel:
        return torch.empty(0, dtype=dtype)
    found = torch.frombuffer(data, dtype=torch.uint8)
    # Where a message is in the midst of others, it begins anywhere.
    return (found if found.data_ptr() % dtype.itemsize == 0 else found.clone()).view(dtype)


class Plain:
    """Bytes as they are."""

    name = "none"

    def encode(self, tensor: torch.Tensor) -> memoryview:
        return bytes_of(tensor.contiguous())

    def decode(self, data: memoryview, numel: int, dtype: torch.dtype) -> torch.Tensor:
        return tensor_of(data, numel, dtype)


class HalfRange:
    """bfloat16: half the bytes of float32, 8 bits of precision, the same range."""

    name = "bf16"

    def encode(self, tensor: torch.Tensor) -> memoryview:
        return bytes_of(tensor.to(torch.bfloat16).contiguous())

    def decode(self, data: memoryview, numel: int, dtype: torch.dtype) -> torch.Tensor:
        return tensor_of(data, numel, torch.bfloat16).to(dtype)


_CODECS: dict[str, Codec] = {codec.name: codec for codec in (Plain(), HalfRange())}


def codec(name: str) -> Codec:
    """The codec of a name; PlanError where there is none."""
    if name not in _CODECS:
        raise PlanError(f'There is no codec "{name}".{did_you_mean(name, _CODECS)} Known are {", ".join(_CODECS)}.')
    return _CODECS[name]
