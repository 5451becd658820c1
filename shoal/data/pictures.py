"""Picture files and base64 texts to uint8 arrays, at once or when asked for."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from shoal.errors import DataError

if TYPE_CHECKING:
    from PIL.Image import Image

# Above this much decoded data, pictures stay in their files and are decoded whenever a batch wants them.
IN_MEMORY_MB = 2048
_MOST_16 = (1 << 16) - 1
_ORIENTATION = 0x0112


@dataclass(frozen=True)
class Picture:
    """One encoded picture: a file or its bytes, and how to name it in an error ("train.csv, row 7")."""

    content: Path | bytes
    where: str

    def size(self) -> tuple[int, int]:
        """Return (height, width) from the picture's header."""
        return self._read(None).shape[:2]  # type: ignore[return-value]

    def decode(self, size: tuple[int, int]) -> NDArray[np.uint8]:
        """Return the picture as RGB, (height, width, 3), resized (bilinear) where it has another size."""
        return self._read(size)

    def pixels(self, mode: str = "RGB") -> NDArray[np.uint8]:
        """Return the picture in its own size: (height, width, 3), or (height, width) for the mode "L", shades of grey."""
        return self._read(None, mode)

    def _read(self, size: tuple[int, int] | None, mode: str = "RGB") -> NDArray[np.uint8]:
        return self.opened(lambda image: np.asarray(_fit(upright(image, mode), size)))

    def opened(self, work: Callable[[Image], NDArray[Any]]) -> NDArray[Any]:
        """What ``work`` makes of the opened picture; DataError where it cannot be decoded."""
        from PIL import Image

        try:
            with Image.open(self.content if isinstance(self.content, Path) else io.BytesIO(self.content)) as image:
                return work(image)
        except (MemoryError, DataError):
            raise
        except FileNotFoundError:
            raise DataError(f"{self.where}: there is no file {self.content!s}.") from None
        # Pillow's decoders raise a dozen unrelated types for damaged pictures (OSError, SyntaxError, struct.error …).
        except Exception as error:
            name = f" {self.content}" if isinstance(self.content, Path) else ""
            raise DataError(
                f"{self.where}: the picture{name} cannot be decoded ({_first_line(error)}); repair it or leave it out."
            ) from error


def upright(image: Image, mode: str) -> Image:
    """A picture turned as its EXIF says, in a mode: RGB, or L for shades of grey. 16 bits a pixel are scaled to 8."""
    from PIL import Image, ImageOps

    turned = image if image.getexif().get(_ORIENTATION, 1) == 1 else ImageOps.exif_transpose(image)
    if turned.mode == "I" or turned.mode.startswith("I;16"):
        # Pillow would cut off all that is above 255.
        values = np.clip(np.asarray(turned.convert("I")), 0, _MOST_16)
        turned = Image.fromarray(((values + 128) // 257).astype(np.uint8))
    return turned if turned.mode == mode else turned.convert(mode)


def upright_size(image: Image) -> tuple[int, int]:
    """(height, width) of a picture when it is turned as its EXIF says."""
    lies = image.getexif().get(_ORIENTATION, 1) in (5, 6, 7, 8)
    return image.size if lies else (image.height, image.width)


def _fit(image: Image, size: tuple[int, int] | None) -> Image:
    from PIL.Image import Resampling

    if size is None or image.size == (size[1], size[0]):
        return image
    return image.resize((size[1], size[0]), Resampling.BILINEAR)


def _first_line(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    # Pillow names an in-memory picture by its address, which says nothing and differs in every run.
    return "not a known picture format" if text.startswith("cannot identify") else text.splitlines()[0]


class LazyPictures:
    """Pictures that are decoded each time a batch wants them: for more than fits into memory."""

    def __init__(self, pictures: Sequence[Picture], size: tuple[int, int]) -> None:
        self._pictures = list(pictures)
        self._size = size

    @property
    def shape(self) -> tuple[int, ...]:
        """(number, height, width, 3)."""
        return (len(self._pictures), *self._size, 3)

    def gather(self, indices: NDArray[np.int64]) -> NDArray[np.uint8]:
        """Return a new array (len(indices), height, width, 3); raises DataError for a damaged picture."""
        rows = np.empty((len(indices), *self._size, 3), dtype=np.uint8)
        for row, index in enumerate(indices):
            rows[row] = self._pictures[int(index)].decode(self._size)
        return rows


def read_pictures(
    pictures: Sequence[Picture], size: int | tuple[int, int] | None, in_memory_mb: int
) -> NDArray[np.uint8] | LazyPictures:
    """Return all pictures (n, height, width, 3) as one array, or lazily where that would take more than in_memory_mb.

    ``size`` is (height, width) or one number for both; None takes the first picture's size for all.
    """
    height_width = _height_width(size) or pictures[0].size()
    lazy = LazyPictures(pictures, height_width)
    if len(pictures) * height_width[0] * height_width[1] * 3 > in_memory_mb << 20:
        return lazy
    return lazy.gather(np.arange(len(pictures), dtype=np.int64))


def _height_width(size: int | tuple[int, int] | None) -> tuple[int, int] | None:
    if size is None:
        return None
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise DataError(f"size is {size!r}; give a height and a width of at least 1 pixel.")
    return height, width
