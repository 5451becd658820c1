"""Single lines of 64 bytes: what lines.c does, and the same bits without a compiler.

A line is what a cache moves, and 16 floats. Of an embedding table a step touches a few.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from shoal.comm import native

LINE_BYTES = 64
_PROBE_LINES = 256


@dataclass(frozen=True)
class Marks:
    """What is known of lines before they are looked at.

    Attributes:
        lines: for each source a byte (uint8) for each line; where it is 0 the line is, of a piece that is ``known``.
        ends: int64, the line that each piece ends before; known: uint8, one for each.
    """

    lines: Sequence[torch.Tensor]
    ends: np.ndarray
    known: np.ndarray


class Lines(Protocol):
    """What can be done with lines."""

    def sum_into(
        self, out: torch.Tensor, sources: Sequence[torch.Tensor], scale: float, found: torch.Tensor, most: int,
        marks: Marks | None = None,
    ) -> int:  # fmt: skip
        """Sum those lines in which any source has a bit that is not 0.

        ``out`` and the sources are 1-D and of one dtype, the sources whole lines. The numbers of these lines go to ``found``
        (int64), in ascending order; (sources[0] + sources[1] + ...) * scale of each goes to the front of ``out``. Returns how
        many they are, or -1 where they are more than ``most`` or where every 256th line already shows that most are full.
        ``marks`` change nothing of that but how long it takes.
        """

    def take(self, row: torch.Tensor, source: torch.Tensor, lines: torch.Tensor) -> None:
        """Gather the lines with these numbers (int64) from ``source`` into ``row``; both 1-D uint8."""

    def put(self, target: torch.Tensor, row: torch.Tensor, lines: torch.Tensor) -> None:
        """Put them back where they came from."""


class _Compiled:
    def __init__(self, lib: ctypes.CDLL) -> None:
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        self._sum = {
            torch.float32: (lib.shoal_sum_lines_f32, ctypes.c_float),
            torch.float64: (lib.shoal_sum_lines_f64, ctypes.c_double),
        }
        for function, kind in self._sum.values():
            function.argtypes = [pointer, pointer, ctypes.c_int, number, kind, pointer, number, pointer, pointer, pointer]
            function.restype = number
        self._take, self._put = lib.shoal_take_lines, lib.shoal_put_lines
        for function in (self._take, self._put):
            function.argtypes, function.restype = [pointer, pointer, pointer, number], None

    def sum_into(
        self, out: torch.Tensor, sources: Sequence[torch.Tensor], scale: float, found: torch.Tensor, most: int,
        marks: Marks | None = None,
    ) -> int:  # fmt: skip
        entry = self._sum.get(out.dtype)
        if entry is None:
            return _TORCH.sum_into(out, sources, scale, found, most)
        lines = sources[0].numel() * out.element_size() // LINE_BYTES
        given = out.data_ptr(), native.addresses(sources), len(sources), lines, scale, found.data_ptr(), most
        if marks is None:
            return int(entry[0](*given, None, None, None))
        return int(entry[0](*given, native.addresses(marks.lines), marks.ends.ctypes.data, marks.known.ctypes.data))

    def take(self, row: torch.Tensor, source: torch.Tensor, lines: torch.Tensor) -> None:
        self._take(row.data_ptr(), source.data_ptr(), lines.data_ptr(), len(lines))

    def put(self, target: torch.Tensor, row: torch.Tensor, lines: torch.Tensor) -> None:
        self._put(target.data_ptr(), row.data_ptr(), lines.data_ptr(), len(lines))


class _Torch:
    def sum_into(
        self, out: torch.Tensor, sources: Sequence[torch.Tensor], scale: float, found: torch.Tensor, most: int,
        marks: Marks | None = None,
    ) -> int:  # fmt: skip
        width = LINE_BYTES // out.element_size()
        full = torch.stack([(s.view(torch.uint8).view(-1, LINE_BYTES) != 0).any(1) for s in sources]).any(0)
        probe, lines = full[::_PROBE_LINES], full.nonzero().reshape(-1)
        if int(probe.sum()) * 2 > len(probe) or len(lines) > most:
            return -1
        found[: len(lines)] = lines
        rows = [s.view(-1, width)[lines] for s in sources]
        total = rows[0]
        for row in rows[1:]:
            total = total + row
        torch.mul(total.reshape(-1), scale, out=out[: len(lines) * width])
        return len(lines)

    def take(self, row: torch.Tensor, source: torch.Tensor, lines: torch.Tensor) -> None:
        row.view(-1, LINE_BYTES).copy_(source.view(-1, LINE_BYTES)[lines])

    def put(self, target: torch.Tensor, row: torch.Tensor, lines: torch.Tensor) -> None:
        target.view(-1, LINE_BYTES)[lines] = row.view(-1, LINE_BYTES)


_TORCH = _Torch()


@functools.lru_cache(maxsize=1)
def load() -> Lines:
    """The functions of lines.c, or the same with torch where there is no compiler."""
    library = getattr(native.load(), "library", None)
    return _TORCH if library is None else _Compiled(library)
