"""A folder of pictures as rows; and when an input of a model is a picture."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
from PIL.Image import Image

from shoal.data.folder import picture_files
from shoal.data.pictures import Picture, upright_size
from shoal.errors import DataError
from shoal.serve.pictures import fitted
from shoal.serve.signature import TensorSignature, layout_of
from shoal.serve.tables.rows import RowByRow


def is_picture(spec: TensorSignature) -> bool:
    """Whether an input is pictures: (channels, height, width) or (height, width, channels), as floats or as bytes."""
    return layout_of(spec) is not None


def pixels(picture: Picture, spec: TensorSignature) -> np.ndarray:
    """Return a picture as one row, as it becomes one where it is served (``shoal.serve.pictures.fitted``).

    DataError where it cannot be decoded; also where it has another size than the model takes and the bundle does not say how
    pictures become inputs: then nothing is resized silently.
    """
    layout = layout_of(spec)
    assert layout is not None
    _, height, width, _ = layout

    def work(image: Image) -> np.ndarray:
        down, across = upright_size(image)
        if spec.pictures is None and (down, across) != (height, width):
            name = f" {picture.content.name}" if isinstance(picture.content, Path) else ""
            raise DataError(
                f"{picture.where}: the picture{name} is {across} × {down} pixels and the model takes {width} × {height}; "
                "resize it as the training pictures were."
            )
        return fitted(image, spec)

    return picture.opened(work)


class FolderRows(RowByRow):
    """The pictures below a folder, by path. What marks them is each one's name, size and time of change."""

    def __init__(self, folder: Path, specs: tuple[TensorSignature, ...]) -> None:
        if len(specs) != 1 or not is_picture(specs[0]):
            shapes = ", ".join(f"{spec.name} {spec.datatype} {list(spec.shape[1:])}" for spec in specs)
            raise DataError(f"{folder} is a folder of pictures, and the model takes none ({shapes}); give a file.")
        found = picture_files(folder)
        if not found:
            raise DataError(f"{folder} holds no pictures; put some there.")
        super().__init__(str(folder), specs, len(found))
        self._folder = folder
        self._paths = found
        self._spec = specs[0]
        self._hash = hashlib.blake2b(digest_size=16)
        self._next = 0
        self._last: list[str] = []

    def read(self, most: int) -> tuple[np.ndarray, ...] | None:
        self._last = []
        return super().read(most)

    def next_row(self) -> tuple[np.ndarray, ...] | None:
        if self._next == len(self._paths):
            return None
        row = pixels(Picture(self._paths[self._next], str(self._folder)), self._spec)
        self._last.append(self._pass())
        return (row,)

    def _pass(self) -> str:
        path = self._paths[self._next]
        name = str(path.relative_to(self._folder))
        try:
            status = path.stat()
        except OSError as error:
            raise DataError(f"{path} cannot be read ({error.strerror}).") from None
        self._hash.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\0".encode(errors="surrogateescape"))
        self._next += 1
        return name

    def skip(self, rows: int) -> None:
        for _ in range(min(rows, len(self._paths) - self._next)):
            self._pass()
            self.at += 1

    @property
    def mark(self) -> str:
        return self._hash.hexdigest()

    def files(self) -> list[str] | None:
        return self._last
