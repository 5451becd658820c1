"""Writing safetensors files piece by piece, without a second copy of the tensors in memory.

The format: https://github.com/huggingface/safetensors. A length (8 bytes, little-endian), a JSON header with each tensor's
dtype, shape and place, then the tensors' bytes.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from shoal.errors import JobError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Entry:
    """A tensor's place in a file: bytes from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


def dtype_name(dtype: torch.dtype) -> str:
    """The format's name of a dtype; JobError for one that it does not know."""
    import torch

    names = {
        torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int64: "I64",
        torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8", torch.bool: "BOOL",
        torch.complex64: "C64",
    }  # fmt: skip
    if dtype not in names:
        raise JobError(
            f"A tensor of the model is {dtype}, which cannot be saved; keep such a tensor out of its buffers."
        )
    return names[dtype]


def dtype_of(name: str) -> torch.dtype:
    """The dtype that the format calls so."""
    import torch

    known = (
        torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
        torch.uint8, torch.bool, torch.complex64,
    )  # fmt: skip
    return next(dtype for dtype in known if dtype_name(dtype) == name)


def header(entries: Mapping[str, Entry]) -> bytes:
    """The beginning of a file that holds these tensors."""
    described = {
        name: {"dtype": e.dtype, "shape": list(e.shape), "data_offsets": [e.start, e.stop]}
        for name, e in entries.items()
    }
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def write(path: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write tensors, one after the other; tensors that share memory are written once for each name."""
    import torch

    entries: dict[str, Entry] = {}
    at = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        entries[name] = Entry(dtype_name(tensor.dtype), tuple(tensor.shape), at, at + size)
        at += size
    with open(path, "wb") as file:
        file.write(header(entries))
        for tensor in tensors.values():
            if tensor.numel():
                file.write(tensor.detach().contiguous().reshape(-1).view(torch.uint8).numpy().data)


def sync(path: Path) -> None:
    """Wait until what was written to a file, or which names a directory has, is on disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
