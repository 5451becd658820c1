"""What a bundle says of how pictures become its input: ``preprocess`` in bundle.json. No torch and no pictures here."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

MODES = MappingProxyType({"RGB": "RGB", "L": "L", "grey": "L", "gray": "L"})
"""What ``mode`` may be -> Pillow's name of it."""

_TO_ONE = 1 / 255
_MOST_SIZE = 1 << 14
_KEYS = ("kind", "scale", "mean", "std", "size", "mode")


@dataclass(frozen=True, kw_only=True)
class Preprocess:
    """How a picture, numbers from 0 to 255, becomes an input: (x · scale - mean) / std for floats, x itself for bytes.

    Attributes:
        scale: 1/255 makes numbers from 0 to 1.
        mean, std: one for each channel, or one for all; in units of what ``scale`` has made.
        size: what a picture is resized to before the model's height and width are cut out of its middle: its shorter side, or its
            (height, width) whatever its aspect. None: as small as holds them.
        mode: RGB, or L for shades of grey; None: as the number of channels says.
    """

    scale: float = _TO_ONE
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    size: int | tuple[int, int] | None = None
    mode: str | None = None

    @classmethod
    def read(cls, described: Any) -> Preprocess | None:
        """From what bundle.json says; None where that is nothing. ValueError, with a sentence, where it cannot be followed."""
        if described is None:
            return None
        if not isinstance(described, Mapping):
            raise ValueError("preprocess is no mapping.")
        strange = next((key for key in described if key not in _KEYS), None)
        if strange is not None:
            raise ValueError(f'preprocess has "{strange}"; what can be there is {", ".join(_KEYS)}.')
        if described.get("kind", "image") != "image":
            raise ValueError("the kind of preprocess is image.")
        mode = described.get("mode")
        if mode is not None and mode not in MODES:
            raise ValueError(f"mode in preprocess is {', '.join(MODES)}.")
        scale = described.get("scale", _TO_ONE)
        if not _is_number(scale) or scale <= 0:
            raise ValueError("scale in preprocess is a number above 0; 1/255 where it is left out.")
        mean, std = _numbers(described, "mean"), _numbers(described, "std")
        if any(value <= 0 for value in std):
            raise ValueError("std in preprocess is above 0.")
        return cls(scale=float(scale), mean=mean, std=std, size=_size(described.get("size")),
                   mode=None if mode is None else MODES[mode])  # fmt: skip

    def check(self, channels: int, height: int, width: int) -> None:
        """ValueError where a model of such pictures cannot be fed so."""
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) not in (0, 1, channels):
                raise ValueError(f"{name} in preprocess is a number, or one for each of the {channels} channels.")
        if self.mode == "RGB" and channels == 1:
            raise ValueError("mode in preprocess is RGB and the model takes one channel.")
        least = (self.size, self.size) if isinstance(self.size, int) else self.size or (height, width)
        if least[0] < height or least[1] < width:
            raise ValueError(f"size in preprocess is less than the {height} × {width} that the model takes.")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _numbers(described: Mapping[str, Any], name: str) -> tuple[float, ...]:
    value = described.get(name)
    values = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
    if not all(map(_is_number, values)):
        raise ValueError(f"{name} in preprocess is a number, or one for each channel.")
    return tuple(float(v) for v in values)


def _size(value: Any) -> int | tuple[int, int] | None:
    values = value if isinstance(value, (list, tuple)) else [] if value is None else [value]
    whole = all(isinstance(v, int) and not isinstance(v, bool) and 0 < v <= _MOST_SIZE for v in values)
    if not whole or len(values) > 2 or (isinstance(value, (list, tuple)) and len(values) != 2):
        raise ValueError("size in preprocess is a number of pixels, or [height, width].")
    return None if not values else values[0] if len(values) == 1 else (values[0], values[1])
