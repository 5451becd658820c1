"""A folder of pictures, one subfolder a class."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from shoal.data.arrays import Images
from shoal.data.pictures import IN_MEMORY_MB, Picture, read_pictures
from shoal.errors import DataError, did_you_mean

_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm", ".pbm", ".jp2")


def folder(
    path: str | os.PathLike[str],
    size: int | tuple[int, int] | None = None,
    *,
    classes: Sequence[str] | None = None,
    in_memory_mb: int = IN_MEMORY_MB,
) -> Images:
    """Open ``path/CLASS/…/picture.png`` as a data set.

    Args:
        path: the folder; its subfolders are the classes, sorted by name. Hidden ones and files that are not
            pictures by their suffix are passed over.
        size: (height, width) or one number for both, to which all pictures are resized; None: the first one's.
        classes: the classes of the training data, for evaluation data that may lack some of them.
        in_memory_mb: where all pictures together take more than this when decoded, they are decoded batch by batch.

    Raises DataError, naming the file: no such folder, no classes, a class that is not in ``classes`` or is
    empty, a damaged picture.
    """
    root = Path(path)
    if not root.is_dir():
        raise DataError(f"There is no folder {root}; give one that holds a subfolder for each class.")
    found = sorted(entry.name for entry in root.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if not found:
        raise DataError(f"{root} has no subfolders; put the pictures of each class into a folder with its name.")
    names = list(classes) if classes is not None else found
    pictures: list[Picture] = []
    labels: list[int] = []
    for name in found:
        if name not in names:
            raise DataError(f"{root / name} is not one of the {len(names)} known classes.{did_you_mean(name, names)}")
        files = picture_files(root / name)
        if not files:
            raise DataError(f"{root / name} holds no pictures; put some there or remove it.")
        pictures += [Picture(file, str(root)) for file in files]
        labels += [names.index(name)] * len(files)
    return Images(read_pictures(pictures, size, in_memory_mb), labels, names, resized=True)


def picture_files(directory: Path) -> list[Path]:
    """The pictures below a directory, by their suffixes, sorted by path; hidden ones are passed over."""
    return sorted(
        file
        for file in directory.rglob("*")
        if file.suffix.lower() in _SUFFIXES and not file.name.startswith(".") and file.is_file()
    )
