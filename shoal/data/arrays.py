"""Data sets over arrays that give a whole batch in one gather.

Anything with a method ``batch(indices)`` (its argument called so) is fed this way: ``indices`` is a numpy int64
array, the answer a batch as ``default_collate`` would have made it of the single items.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from shoal.errors import DataError

if TYPE_CHECKING:
    import torch


class Pictures(Protocol):
    """Pictures that are not in memory as one array: decoded when they are asked for."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(number, height, width, 3)."""
        ...

    def gather(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return a new array (len(indices), height, width, 3); raises DataError for a picture that is damaged."""
        ...


class ArrayDataset:
    """Two arrays, or memory-mapped files of them, as a data set of (input, target).

    Args:
        inputs: numpy array or torch tensor of shape (n, …), any dtype that torch knows; kept as it is.
        labels: the same, (n,) or (n, …).
        transform: what to do to a *batch* of inputs, a tensor (b, …). It must not be random: a random
            augmentation belongs into a map-style Dataset, whose items each have a random stream of their own.

    Raises DataError where the lengths differ.
    """

    def __init__(
        self, inputs: Any, labels: Any, transform: Callable[[torch.Tensor], torch.Tensor] | None = None
    ) -> None:
        self.inputs = inputs if hasattr(inputs, "shape") else np.asarray(inputs)
        self.labels = labels if hasattr(labels, "shape") else np.asarray(labels)
        self.transform = transform
        if len(self.inputs) != len(self.labels):
            raise DataError(f"There are {len(self.inputs)} inputs and {len(self.labels)} labels; give as many of each.")

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        inputs, targets = self.batch(np.array([index], dtype=np.int64))
        return inputs[0], targets[0]

    def batch(self, indices: NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (inputs, targets) of these samples: new tensors that may be changed."""
        inputs = gather(self.inputs, indices)
        if self.transform is not None:
            inputs = self.transform(inputs)
        return inputs, gather(self.labels, indices)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "inputs": _pack(self.inputs), "labels": _pack(self.labels)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, inputs=_unpack(state["inputs"]), labels=_unpack(state["labels"]))


class Images:
    """Labelled pictures, kept as uint8, given as float32 scaled to 0…1 and nothing else.

    Args:
        images: uint8 of shape (n, height, width, channels): a numpy array, also memory-mapped, or ``Pictures``.
        labels: n whole numbers, each below ``len(classes)``.
        classes: the classes' names, in the order of their numbers.
        channels_last: the memory layout of the batches, which are (b, channels, height, width) either way.
            True costs least: the pictures lie that way already, the batch is a permuted view of the gathered
            rows. False, the default, gives contiguous tensors, so that ``view`` works in any model. May be set at
            any time; the values are the same bits.
        resized: whether pictures of other sizes were resized to this one, whatever their aspect.

    Raises DataError where shapes, types or lengths do not fit.
    """

    def __init__(
        self, images: np.ndarray | Pictures, labels: Any, classes: Sequence[str], channels_last: bool = False,
        resized: bool = False,
    ) -> None:  # fmt: skip
        self.images = images
        self.labels: NDArray[np.int64] = np.asarray(labels, dtype=np.int64)
        self.classes = tuple(classes)
        self.channels_last = channels_last
        self.resized = resized
        if len(images.shape) != 4 or (isinstance(images, np.ndarray) and images.dtype != np.uint8):
            raise DataError("Images must be a uint8 array of shape (number, height, width, channels).")
        if self.labels.shape != images.shape[:1]:
            raise DataError(f"There are {images.shape[0]} images and {self.labels.size} labels; give as many of each.")
        outside = np.flatnonzero((self.labels < 0) | (self.labels >= len(self.classes)))
        if outside.size:
            row = int(outside[0])
            raise DataError(f"Image {row} has the label {self.labels[row]}, but there are {len(self.classes)} classes.")

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of every picture."""
        return self.images.shape[1], self.images.shape[2]

    @property
    def preprocess(self) -> dict[str, Any]:
        """How a picture becomes an input here, as bundle.json says it."""
        size = {"size": list(self.size)} if self.resized else {}
        return {"kind": "image", "mode": "L" if self.images.shape[3] == 1 else "RGB", "scale": 1 / 255, **size}

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        inputs, targets = self.batch(np.array([index % len(self)], dtype=np.int64))
        return inputs[0], int(targets[0])

    def batch(self, indices: NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (float32 (b, channels, height, width) in 0…1, int64 (b,)): new tensors that may be changed."""
        import torch

        if isinstance(self.images, np.ndarray):
            rows = np.take(np.asarray(self.images), indices, axis=0)
        else:
            rows = self.images.gather(indices)
        pictures = torch.from_numpy(rows)
        if not self.channels_last:
            # Reordering single bytes costs a quarter of reordering floats.
            pictures = pictures.permute(0, 3, 1, 2).contiguous()
        inputs = pictures.to(torch.float32).div_(255)
        if self.channels_last:
            inputs = inputs.permute(0, 3, 1, 2)
        return inputs, torch.from_numpy(np.take(self.labels, indices))

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "images": _pack(self.images)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, images=_unpack(state["images"]))


class _MappedFile:
    """Stands for a memory-mapped array in a pickle: another process maps the file again, no byte is copied."""

    def __init__(self, array: np.memmap) -> None:
        self.path, self.offset = str(array.filename), array.offset
        self.shape, self.dtype = array.shape, array.dtype

    def open(self) -> np.memmap:
        return np.memmap(self.path, mode="r", dtype=self.dtype, offset=self.offset, shape=self.shape)


def _pack(array: Any) -> Any:
    if not isinstance(array, np.memmap) or array.filename is None or not array.flags.c_contiguous:
        return array
    # A slice of a mapped array still carries the offset of the whole; only the whole file can be mapped again.
    is_whole_file = os.path.exists(array.filename) and os.path.getsize(array.filename) == array.offset + array.nbytes
    return _MappedFile(array) if is_whole_file else np.array(array)


def _unpack(array: Any) -> Any:
    return array.open() if isinstance(array, _MappedFile) else array


def gather(array: Any, indices: NDArray[np.int64]) -> torch.Tensor:
    """Return these rows of a numpy array or a tensor as a new tensor; the array may be read-only or memory-mapped."""
    import torch

    if isinstance(array, torch.Tensor):
        return array.index_select(0, torch.from_numpy(indices).to(array.device))
    return torch.from_numpy(np.take(np.asarray(array), indices, axis=0))
