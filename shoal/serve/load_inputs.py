"""What a load test sends: random inputs that fit a model's metadata, or those of a file, rendered to whole requests."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shoal.errors import DataError, RequestError
from shoal.serve import wire

_MOST_PAYLOADS = 64
_MOST_BYTES = 64 << 20
_PICTURES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp"})
# A free dimension other than the batch is mostly a text's length; that of a sentence, in tokens.
_SHORTEST, _LONGEST = 5, 60
_SMALLEST_TOKEN, _LARGEST_TOKEN = 1, 999

Tensor = tuple[str, str, np.ndarray]


def random_inputs(metadata: Mapping[str, Any], random: np.random.Generator) -> list[Tensor]:
    """Return (name, data type, array) for one row of each input that a model's metadata names.

    Floats are normal, bytes 0 to 255, other integers 1 to 999 as tokens are. Free dimensions are 5 to 60 long, all alike
    within a request. An input whose name says that it is a mask is all ones; one of types or positions all zeros.

    Raises:
        RequestError: an input's type is not one of the protocol's numbers.
    """
    length = int(random.integers(_SHORTEST, _LONGEST + 1))
    tensors = []
    for entry in metadata.get("inputs", ()):
        name, datatype = str(entry["name"]), str(entry["datatype"])
        if datatype not in wire.DATATYPES:
            known = ", ".join(wire.DATATYPES)
            raise RequestError(f"{name} is {datatype}, for which nothing can be made up; give --input FILE (made up: {known}).")
        shape = tuple(length if size < 0 else int(size) for size in _row_shape(entry))
        tensors.append((name, datatype, _made_up(name, datatype, (1, *shape), random)))
    return tensors


def read_input(path: Path, metadata: Mapping[str, Any]) -> list[Tensor]:
    """Return the input that a file holds, for a model with one input: a .npy array, or a picture.

    An array is [rows, ...], or one row. A picture is brought to the input's size; for an input of floats to 0 … 1.

    Raises:
        RequestError: the model has more than one input, or the file does not fit it.
        DataError: the file cannot be read.
    """
    entries = list(metadata.get("inputs", ()))
    if len(entries) != 1:
        names = ", ".join(str(entry["name"]) for entry in entries)
        raise RequestError(f"{path} is one input, but the model has {names}; give a .json request with all of them.")
    entry = entries[0]
    row = _row_shape(entry)
    array = _picture(path, row, str(entry["datatype"])) if path.suffix.lower() in _PICTURES else _array(path)
    if array.ndim == len(row):
        array = array[None]
    datatype, array = wire.as_sent(array, str(entry["datatype"]))
    return [(str(entry["name"]), datatype, array)]


def payloads(
    address: wire.Address, metadata: Mapping[str, Any], *, file: Path | None = None, binary: bool = True,
    timeout_s: float | None = None, seed: int = 0,
) -> list[bytes]:  # fmt: skip
    """Return whole requests to the model that ``metadata`` describes, to be sent in turn: up to 64 different ones, or the file.

    A ``.json`` file is sent as it is, as the body of the request.

    Raises:
        RequestError, DataError: as ``random_inputs`` and ``read_input``.
    """
    path = wire.model_path(str(metadata["name"]), "infer")
    if file is not None and file.suffix.lower() == ".json":
        return [wire.render(address, "POST", path, _json(file), {"Content-Type": "application/json"})]
    parameters = {} if timeout_s is None else {"timeout": max(1, round(timeout_s * 1e6))}
    random, made, size = np.random.default_rng(seed), list[bytes](), 0
    while not made or (file is None and len(made) < _MOST_PAYLOADS and size < _MOST_BYTES):
        tensors = random_inputs(metadata, random) if file is None else read_input(file, metadata)
        if not binary and any(datatype == "FP16" for _, datatype, _ in tensors):
            raise RequestError("The protocol has no FP16 in JSON; leave out --as-json.")
        body, headers = wire.encode_infer(tensors, parameters, binary)
        made.append(wire.render(address, "POST", path, body, headers))
        size += len(made[-1])
    return made


def _row_shape(entry: Mapping[str, Any]) -> tuple[int, ...]:
    return tuple(int(size) for size in entry["shape"][1:])


def _made_up(name: str, datatype: str, shape: Sequence[int], random: np.random.Generator) -> np.ndarray:
    dtype = wire.DATATYPES[datatype]
    if "mask" in name.lower():
        return wire.as_sent(np.ones(shape, "<f4"), datatype)[1] if datatype == "BF16" else np.ones(shape, dtype)
    if datatype == "BF16":
        return wire.to_bf16(random.standard_normal(shape, np.float32))
    if dtype.kind == "f":
        return random.standard_normal(shape, np.float32).astype(dtype)
    if dtype.kind == "b":
        return random.integers(0, 2, shape).astype(dtype)
    if "type" in name.lower() or "position" in name.lower():
        return np.zeros(shape, dtype)
    if dtype.itemsize == 1:
        return random.integers(0, 256 if dtype.kind == "u" else 128, shape).astype(dtype)
    return random.integers(_SMALLEST_TOKEN, _LARGEST_TOKEN + 1, shape).astype(dtype)


def _array(path: Path) -> np.ndarray:
    if path.suffix.lower() != ".npy":
        raise RequestError(f"{path} is no input that can be read; give a .npy array, a picture, or a .json request.")
    try:
        loaded = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(f"{path} cannot be read as a .npy array ({type(error).__name__}).") from None
    array: np.ndarray = loaded
    return array


def _picture(path: Path, row: tuple[int, ...], datatype: str) -> np.ndarray:
    from PIL import Image

    channels_first = len(row) == 3 and row[0] in (1, 3)
    if not channels_first and not (len(row) == 3 and row[2] in (1, 3)):
        raise RequestError(f"{path} is a picture, but the model wants the shape {list(row)} a row; give a .npy array.")
    height, width, channels = (row[1], row[2], row[0]) if channels_first else row
    try:
        with Image.open(path) as image:
            plain = image.convert("RGB" if channels == 3 else "L")
    # Pillow's decoders raise a dozen unrelated types for damaged pictures.
    except Exception as error:
        raise DataError(f"{path} cannot be read as a picture ({type(error).__name__}).") from None
    if height > 0 and width > 0 and plain.size != (width, height):
        plain = plain.resize((width, height), Image.Resampling.BILINEAR)
    pixels = np.asarray(plain).reshape(plain.height, plain.width, channels)
    pixels = np.moveaxis(pixels, 2, 0) if channels_first else pixels
    return pixels if "INT" in datatype else (pixels / 255).astype(np.float16 if datatype == "FP16" else np.float32)


def _json(path: Path) -> bytes:
    try:
        body = path.read_bytes()
        json.loads(body)
    except (OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as a JSON request ({type(error).__name__}).") from None
    return body
