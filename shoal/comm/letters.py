"""Letters from one rank to another: what letters.c does, and the same without a compiler.

See the beginning of ``letters.c`` for the rings, the pieces, and what is counted. ``Post`` holds the state of both.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any, Protocol

from shoal.comm import native
from shoal.comm.region import LETTER, RegionLayout

INSIDE = -1
NOTHING, ANOTHER = -1, -2
_PTR = ctypes.c_void_p


class Letter(ctypes.Structure):
    """One letter; ``struct letter``."""

    _fields_ = [
        ("key", ctypes.c_uint64), ("tag", ctypes.c_int64), ("total", ctypes.c_int64), ("bytes", ctypes.c_int32),
        ("piece", ctypes.c_int32), ("text", ctypes.c_char * (LETTER - 32)),
    ]  # fmt: skip


_TEXT_AT, _TEXT = Letter.text.offset, Letter.text.size


class Way(ctypes.Structure):
    """What one rank knows of its letters to and from one other; ``struct way``."""

    _fields_ = [
        ("written", ctypes.c_uint32), ("freed", ctypes.c_uint32), ("read", ctypes.c_uint32), ("unused", ctypes.c_uint32),
        ("outbox", _PTR), ("inbox", _PTR), ("its_pieces", _PTR),
        ("head", _PTR), ("its_tail", _PTR), ("its_head", _PTR), ("tail", _PTR), ("it_sleeps", _PTR),
        ("pieces_used", ctypes.POINTER(ctypes.c_int32)),
    ]  # fmt: skip


class Post(ctypes.Structure):
    """All of a rank's letters; ``struct post``."""

    _fields_ = [
        ("letters", ctypes.c_int32), ("world_size", ctypes.c_int32), ("pieces_free", ctypes.c_int32),
        ("unused", ctypes.c_int32), ("piece_bytes", ctypes.c_int64), ("pieces", _PTR), ("asleep", _PTR),
        ("free", ctypes.POINTER(ctypes.c_int32)), ("ways", ctypes.POINTER(Way)),
    ]  # fmt: skip


def post_of(layout: RegionLayout, base: int, rank: int) -> Post:
    """A rank's letters in a region that begins at address ``base``; its own words there are emptied."""
    others = range(layout.world_size)
    ways = (Way * layout.world_size)()
    for other, way in zip(others, ways, strict=True):
        way.outbox, way.inbox = base + layout.letter(rank, other, 0), base + layout.letter(other, rank, 0)
        way.its_pieces = base + layout.mail_piece(other, 0)
        way.head, way.its_tail = base + layout.head(rank, other), base + layout.tail(other, rank)
        way.its_head, way.tail = base + layout.head(other, rank), base + layout.tail(rank, other)
        way.it_sleeps = base + layout.asleep(other)
        way.pieces_used = (ctypes.c_int32 * layout.letters)()
        for word in (way.head, way.tail):
            ctypes.c_uint32.from_address(word).value = 0
    ctypes.c_uint32.from_address(base + layout.asleep(rank)).value = 0
    # The first pieces are one receiver's each; the others are anybody's.
    free = (ctypes.c_int32 * layout.mail_pieces)(*range(layout.world_size, layout.world_size + layout.mail_pieces))
    return Post(
        letters=layout.letters, world_size=layout.world_size, pieces_free=layout.mail_pieces,
        piece_bytes=layout.mail_piece_bytes, pieces=base + layout.mail_piece(rank, 0), asleep=base + layout.asleep(rank),
        free=free, ways=ways,
    )  # fmt: skip


class Clerk(Protocol):
    """The functions of letters.c; see there for what they return."""

    def write(self, post: Any, receiver: int, key: int, tag: int, total: int, address: int, sent: int, /) -> int:
        """Write of a message what there is room for: the bytes that have left, or NOTHING."""

    def read(self, post: Any, sender: int, key: int, tag: int, total: int, address: int, got: int, /) -> int:
        """Copy what has come of a message: the bytes that are here, or NOTHING, or ANOTHER."""

    def next(self, post: Any, sender: int, /) -> int | None:
        """The address of the next letter, if there is one."""

    def await_letter(self, post: Any, sender: int, spin_ns: int, yields: int, nap_ns: int, /) -> int:
        """Wait for a moment until there is a letter; whether there is."""

    def await_reader(self, post: Any, receiver: int, spin_ns: int, yields: int, nap_ns: int, /) -> int:
        """Wait for a moment until a letter more was read; whether it was."""


@functools.lru_cache(maxsize=1)
def load() -> Clerk:
    """What letters.c has, or the same in Python where there is no compiler."""
    library = getattr(native.load(), "library", None)
    return InPython() if library is None else _Compiled(library)


class _Compiled:
    def __init__(self, library: Any) -> None:
        i32, i64 = ctypes.c_int32, ctypes.c_int64
        message = [ctypes.POINTER(Post), i32, ctypes.c_uint64, i64, i64, _PTR, i64]
        wait = [ctypes.POINTER(Post), i32, i64, i32, i64]
        self.write = self._declared(library.shoal_write_letters, i64, message)
        self.read = self._declared(library.shoal_read_letters, i64, message)
        self.next = self._declared(library.shoal_next_letter, _PTR, [ctypes.POINTER(Post), i32])
        self.await_letter = self._declared(library.shoal_await_letter, ctypes.c_int, wait)
        self.await_reader = self._declared(library.shoal_await_reader, ctypes.c_int, wait)

    @staticmethod
    def _declared(function: Any, result: Any, arguments: list[Any]) -> Any:
        function.restype, function.argtypes = result, arguments
        return function


class InPython:
    """The functions of letters.c without a compiler."""

    def write(self, post: Any, receiver: int, key: int, tag: int, total: int, address: int, sent: int, /) -> int:
        way = post.ways[receiver]
        self._take_back(post, way)
        wrote = False
        while (sent < total or not wrote) and (way.written - way.freed) & 0xFFFFFFFF < post.letters:
            place_of_letter = way.outbox + way.written % post.letters * LETTER
            letter = Letter.from_address(place_of_letter)
            size, piece, place = total - sent, INSIDE, place_of_letter + _TEXT_AT
            if size > _TEXT:
                piece = self._take_piece(post, way, receiver)
                if piece < 0:
                    break
                size, place = min(size, post.piece_bytes), post.pieces + piece * post.piece_bytes
            ctypes.memmove(place, address + sent, size)
            letter.key, letter.tag, letter.total, letter.bytes, letter.piece = key, tag, total, size, piece
            way.pieces_used[way.written % post.letters] = piece
            way.written += 1
            native.load().post(way.head, way.written)
            sent, wrote = sent + size, True
        return sent if wrote or sent else NOTHING

    def read(self, post: Any, sender: int, key: int, tag: int, total: int, address: int, got: int, /) -> int:
        way = post.ways[sender]
        read = False
        while (got < total or not read) and (place_of_letter := self.next(post, sender)):
            letter = Letter.from_address(place_of_letter)
            if got == 0 and (letter.key, letter.tag, letter.total) != (key, tag, total):
                return ANOTHER
            inside = letter.piece == INSIDE
            place = place_of_letter + _TEXT_AT if inside else way.its_pieces + letter.piece * post.piece_bytes
            ctypes.memmove(address + got, place, letter.bytes)
            got, read = got + letter.bytes, True
            way.read += 1
            native.load().post(way.tail, way.read)
        return got if read or got else NOTHING

    def next(self, post: Any, sender: int, /) -> int | None:
        way = post.ways[sender]
        return way.inbox + way.read % post.letters * LETTER if _news(post, way.its_head, way.read) else None

    def await_letter(self, post: Any, sender: int, spin_ns: int, yields: int, nap_ns: int, /) -> int:
        way = post.ways[sender]
        return _await(way.its_head, way.read + 1, nap_ns)

    def await_reader(self, post: Any, receiver: int, spin_ns: int, yields: int, nap_ns: int, /) -> int:
        way = post.ways[receiver]
        return _await(way.its_tail, way.freed + 1, nap_ns)

    def _take_back(self, post: Any, way: Any) -> None:
        for _ in range(_news(post, way.its_tail, way.freed)):
            piece = way.pieces_used[way.freed % post.letters]
            if piece >= post.world_size:
                post.free[post.pieces_free] = piece
                post.pieces_free += 1
            way.freed += 1

    def _take_piece(self, post: Any, way: Any, receiver: int) -> int:
        if post.pieces_free > 0:
            post.pieces_free -= 1
            return int(post.free[post.pieces_free])
        under_way = (way.pieces_used[k % post.letters] for k in range(way.freed, way.written))
        return -1 if receiver in under_way else receiver


def _news(post: Any, word: int, known: int) -> int:
    found = (ctypes.c_uint32.from_address(word).value - known) & 0xFFFFFFFF
    # Never more than the ring holds: such a word was emptied, because its rank begins anew.
    return found if found <= post.letters else 0


def _await(word: int, target: int, nap_ns: int) -> bool:
    # A sleeper without a flag is not always woken (by a rank that has a compiler): naps are short.
    return native.load().wait_all(word, 0, 1, target, 0.0, min(nap_ns * 1e-9, 0.001)) < 0
