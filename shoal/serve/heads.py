"""Heads of requests that were read before. Clients send the same head again and again: equal bytes ask for equal things."""

from __future__ import annotations

from typing import Any

_MOST = 256
_LONGEST = 1024
_END = b"\r\n\r\n"


class Heads:
    """What known heads ask for; bounded, and forgotten as a whole when it is full."""

    def __init__(self) -> None:
        self._known: dict[bytes, tuple[Any, int]] = {}

    def keep(self, piece: bytes, size: int, asked: Any) -> None:
        """A piece that was one whole request with a body of ``size`` bytes, as a parser has found, asked for this."""
        head = piece[: len(piece) - size]
        # What a parser takes for the end of a head, but ``find`` would not, is read by the parser each time.
        if len(head) <= _LONGEST and head.find(_END) + len(_END) == len(head):
            if len(self._known) >= _MOST:
                self._known.clear()
            self._known[head] = (asked, size)

    def find(self, piece: bytes) -> tuple[Any, bytes] | None:
        """What a piece asks for, and its body, where it is one whole request with a known head."""
        end = piece.find(_END, 0, _LONGEST) + len(_END)
        known = self._known.get(piece[:end])
        if known is None or len(piece) - end != known[1]:
            return None
        return known[0], piece[end:]
