"""Notes that may grow: what a worker has to leave behind and nobody can say the size of beforehand.

They lie in the arena's own block, behind its regions. A memfd grows where it is written to and takes pages only where
something is, so every worker has a wide span there and nothing is reserved: two pages, for even and odd steps, and a log.
A page says what holds at a step's beginning, and how much of the log belongs to that. The log is only ever continued from
there, so a step that is computed again finds its page, and its part of the log, as they were.
"""

from __future__ import annotations

import os
import struct

from shoal.comm.arena import Arena
from shoal.errors import JobFailed

_SPAN = 1 << 36
_LOG, _PAGES = 0, (1 << 35, (1 << 35) + (1 << 34))
_HEAD = struct.Struct("<qqq")


class Journal:
    """The growing notes of one worker. Only that worker writes them, or the supervisor while there is none."""

    def __init__(self, arena: Arena, rank: int) -> None:
        self._fd = arena.memory.fd
        self._at = (-(-arena.layout.size // _SPAN) + rank) * _SPAN
        self._own = arena.memory.growing.setdefault(rank, {}) if self._fd < 0 else {}

    def write_log(self, at: int, data: bytes) -> int:
        """Write behind the first ``at`` bytes of the log; how long it is then. JobFailed where memory has run out."""
        self._write(_LOG, at, data)
        return at + len(data)

    def read_log(self, length: int) -> bytes:
        return self._read(_LOG, length)

    def write_page(self, step: int, data: bytes) -> None:
        """Say what holds at the beginning of ``step``; the page of ``step - 1`` stays as it is.

        Where that was said before, it holds until this one is there as a whole.
        """
        area = _PAGES[step % 2]
        written, at, length = self._head(area)
        if written != step or not length:
            self._write(area, 0, _HEAD.pack(step, 0, len(data)) + data)
            return
        at = 0 if len(data) <= at else at + length
        self._write(area, _HEAD.size + at, data)
        self._write(area, 0, _HEAD.pack(step, at, len(data)))

    def read_page(self, step: int) -> bytes | None:
        """What was said for that step, or None."""
        area = _PAGES[step % 2]
        written, at, length = self._head(area)
        return self._read(area, length, _HEAD.size + at) if written == step and length else None

    def _head(self, area: int) -> tuple[int, int, int]:
        """Of which step a page is, where its data begins, and how long that is."""
        head = self._read(area, _HEAD.size)
        return _HEAD.unpack(head) if len(head) == _HEAD.size else (-1, 0, 0)

    def _write(self, area: int, at: int, data: bytes) -> None:
        if self._fd < 0:
            held = self._own.setdefault(area, bytearray())
            held[at : at + len(data)] = data
            return
        view, offset = memoryview(data), self._at + area + at
        try:
            while len(view):
                written = os.pwrite(self._fd, view[: 1 << 30], offset)
                view, offset = view[written:], offset + written
        except OSError as error:
            raise JobFailed(
                f"The state of the metrics could not be kept in shared memory ({error.strerror}); "
                "take metrics that keep less, or have them over the evaluation data only."
            ) from None

    def _read(self, area: int, length: int, at: int = 0) -> bytes:
        if self._fd < 0:
            return bytes(self._own.get(area, b"")[at : at + length])
        parts, offset = [], self._at + area + at
        while length and (part := os.pread(self._fd, min(length, 1 << 30), offset)):
            parts.append(part)
            length, offset = length - len(part), offset + len(part)
        return b"".join(parts)
