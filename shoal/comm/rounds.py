"""One exchange between the ranks of a circle, round by round: what rounds.c does, and the same without a compiler.

See the beginning of ``rounds.c`` for the seats, the rounds, and why two halves of a seat suffice.
"""

from __future__ import annotations

import ctypes
import functools
import time
from collections.abc import Callable, Sequence

import torch

from shoal.comm import native

MEMBERS, LINE, SEAT_HEAD = 64, 64, 256
SHARED, REDUCE, BACK = 1, 2, 4
FINISHED, REDUCE_PLEASE, MISMATCH = -1, -2, -3
WRITE, READ, READ_REDUCED, RETURNED, DONE = range(5)
SUMMED_HERE = {torch.float32: 1, torch.float64: 2, torch.bfloat16: 3, torch.int64: 4}
"""Which sums need no help of the caller, and their numbers in rounds.c."""

_Pointers = ctypes.c_void_p * MEMBERS
_Sizes = ctypes.c_int64 * MEMBERS


class Circle(ctypes.Structure):
    """The ranks that meet, seen from one of them; ``struct circle``."""

    _fields_ = [
        ("n", ctypes.c_int32), ("me", ctypes.c_int32), ("turn", ctypes.c_uint32), ("posted", ctypes.c_uint32),
        ("piece", ctypes.c_int64), ("seats", _Pointers),
    ]  # fmt: skip


class Exchange(ctypes.Structure):
    """One exchange, under way; ``struct exchange``."""

    _fields_ = [
        ("circle", ctypes.POINTER(Circle)),
        ("flags", ctypes.c_int32), ("phase", ctypes.c_int32), ("dtype", ctypes.c_int32), ("other", ctypes.c_int32),
        ("divisor", ctypes.c_int64), ("round", ctypes.c_int64), ("rounds", ctypes.c_int64), ("part", ctypes.c_int64),
        ("signature", ctypes.c_uint64),
        ("send", _Pointers), ("recv", _Pointers), ("send_bytes", _Sizes), ("recv_bytes", _Sizes),
    ]  # fmt: skip


Advance = Callable[[Exchange, int, int, int], int]
"""(exchange, spin_ns, yields, nap_ns) -> FINISHED, REDUCE_PLEASE, MISMATCH or the member to wait for."""

Lay = Callable[[Exchange, int, int, int, int, int, int, int, int], None]
"""(exchange, flags, dtype, divisor, signature, given, given_bytes, taken, taken_bytes): see rounds.c."""


def seat_bytes(piece: int) -> int:
    """How large a seat is whose halves hold ``piece`` bytes (a multiple of 64)."""
    return SEAT_HEAD + 2 * (LINE + piece)


def plan(x: Exchange, most: int) -> None:
    """Say how much a round moves, and how many there are where the longest stretch has ``most`` bytes."""
    circle = x.circle.contents
    part = circle.piece if x.flags & SHARED else circle.piece // circle.n // LINE * LINE
    x.part, x.phase, x.round, x.rounds = part, WRITE, 0, max(1, -(-most // part))


def at(address: int, dtype: torch.dtype, count: int) -> torch.Tensor:
    """A 1-D tensor over memory of this process that somebody else keeps."""
    width = torch.empty(0, dtype=dtype).element_size()
    return torch.frombuffer((ctypes.c_char * (count * width)).from_address(address), dtype=dtype)


def sources(x: Exchange) -> tuple[list[int], int, int]:
    """What this round reduces: the addresses, one a member, where the result goes, and how many bytes it has."""
    circle = x.circle.contents
    start = x.round * x.part
    place = LINE + (0 if x.flags & SHARED else circle.me * x.part)
    addresses = [_half(circle, k) + place for k in range(circle.n)]
    addresses[circle.me] = x.send[circle.me] + start
    return addresses, x.recv[circle.me] + start, _stretch(x, x.recv_bytes[circle.me])


def summed(values: Sequence[torch.Tensor], divisor: int) -> torch.Tensor:
    """The sum in that order, divided; half precision is summed in single precision and rounded once."""
    wide = torch.float32 if values[0].dtype in (torch.bfloat16, torch.float16) else values[0].dtype
    total = values[0].to(wide)
    for value in values[1:]:
        total = total + value.to(wide)
    if divisor > 1:
        whole = not (wide.is_floating_point or wide.is_complex)
        total = torch.div(total, divisor, rounding_mode="trunc" if whole else None)
    return total.to(values[0].dtype)


@functools.lru_cache(maxsize=1)
def load() -> tuple[Advance, Lay]:
    """``shoal_advance`` and ``shoal_lay`` of rounds.c, or the same in Python where there is no compiler."""
    library = getattr(native.load(), "library", None)
    if library is None:
        return advance, lay
    i32, i64, pointer = ctypes.c_int32, ctypes.c_int64, ctypes.c_void_p
    go_on, say = library.shoal_advance, library.shoal_lay
    go_on.argtypes, go_on.restype = [ctypes.POINTER(Exchange), i64, i32, i64], ctypes.c_int
    say.argtypes = [ctypes.POINTER(Exchange), i32, i32, i64, ctypes.c_uint64, pointer, i64, pointer, i64]
    say.restype = None
    return go_on, say


def lay(
    x: Exchange, flags: int, dtype: int, divisor: int, signature: int,
    given: int, given_bytes: int, taken: int, taken_bytes: int,
) -> None:  # fmt: skip
    """``shoal_lay`` without a compiler."""
    circle = x.circle.contents
    me = circle.me
    x.flags, x.dtype, x.divisor, x.signature = flags, dtype, divisor, signature
    for k in range(circle.n):
        x.send[k] = given if flags & SHARED else given + k * given_bytes
        x.send_bytes[k] = given_bytes if not flags & SHARED or k == me else 0
        x.recv[k] = taken if flags & REDUCE else taken + k * taken_bytes
        x.recv_bytes[k] = taken_bytes if not flags & REDUCE or k == me else 0
    if not flags & REDUCE and x.recv[me] != x.send[me]:
        _copy(x.recv[me] or 0, x.send[me] or 0, given_bytes)
    plan(x, max(given_bytes, taken_bytes))


def advance(x: Exchange, spin_ns: int, yields: int, nap_ns: int) -> int:
    """``shoal_advance`` without a compiler: the same words, the same bits, slower."""
    circle = x.circle.contents
    while True:
        if x.phase == WRITE:
            _write(x, circle)
            _post(circle)
            x.phase = READ
        if x.phase == READ:
            missing = _await_all(circle, nap_ns)
            if missing >= 0:
                return missing
            if x.round == 0 and not _agree(x, circle):
                return MISMATCH
            if x.flags & REDUCE:
                if _stretch(x, x.recv_bytes[circle.me]) > 0:
                    if x.dtype == 0:
                        x.phase = READ_REDUCED
                        return REDUCE_PLEASE
                    dtype = next(kind for kind, number in SUMMED_HERE.items() if number == x.dtype)
                    reduce_by(x, dtype, lambda values: summed(values, x.divisor))
                x.phase = READ_REDUCED
            else:
                _read(x, circle, False)
        if x.phase == READ_REDUCED and x.flags & BACK:
            size = _stretch(x, x.recv_bytes[circle.me])
            place = _half(circle, circle.me) + LINE + circle.me * x.part
            _copy(place, (x.recv[circle.me] or 0) + x.round * x.part, size)
            _post(circle)
            x.phase = RETURNED
        if x.phase == RETURNED:
            missing = _await_all(circle, nap_ns)
            if missing >= 0:
                return missing
            _read(x, circle, True)
        if x.phase == DONE:
            return FINISHED
        circle.turn = (circle.turn + 1) & 0xFFFFFFFF
        x.round += 1
        x.phase = WRITE if x.round < x.rounds else DONE


def reduce_by(x: Exchange, dtype: torch.dtype, how: Callable[[list[torch.Tensor]], torch.Tensor]) -> None:
    """Reduce this round's bytes with torch."""
    addresses, result, size = sources(x)
    count = size // torch.empty(0, dtype=dtype).element_size()
    at(result, dtype, count).copy_(how([at(address, dtype, count) for address in addresses]))


def _half(circle: Circle, k: int) -> int:
    return int(circle.seats[k] or 0) + SEAT_HEAD + (circle.turn & 1) * (LINE + circle.piece)


def _stretch(x: Exchange, whole: int) -> int:
    return max(0, min(int(x.part), whole - x.round * x.part))


def _copy(to: int, source: int, size: int) -> None:
    if size > 0:
        ctypes.memmove(to, source, size)


def _write(x: Exchange, circle: Circle) -> None:
    half = _half(circle, circle.me)
    if x.round == 0:
        (ctypes.c_uint64 * 2).from_address(half)[:] = [x.signature, x.rounds]
    for k in range(circle.n):
        if (k == circle.me) == bool(x.flags & SHARED):
            place = half + LINE + (0 if x.flags & SHARED else k * x.part)
            _copy(place, (x.send[k] or 0) + x.round * x.part, _stretch(x, x.send_bytes[k]))


def _read(x: Exchange, circle: Circle, reduced: bool) -> None:
    for k in range(circle.n):
        if k != circle.me:
            part = 0 if x.flags & SHARED else k if reduced else circle.me
            place = _half(circle, k) + LINE + part * x.part
            _copy((x.recv[k] or 0) + x.round * x.part, place, _stretch(x, x.recv_bytes[k]))


def _agree(x: Exchange, circle: Circle) -> bool:
    for k in range(circle.n):
        signature, rounds = (ctypes.c_uint64 * 2).from_address(_half(circle, k))
        if signature != x.signature:
            x.other = k
            return False
        x.rounds = max(x.rounds, rounds)
    return True


def _post(circle: Circle) -> None:
    circle.posted = (circle.posted + 1) & 0xFFFFFFFF
    native.load().post(circle.seats[circle.me], circle.posted)


def _await_all(circle: Circle, nap_ns: int) -> int:
    # A sleeper without a flag is not always woken (by a rank that has a compiler): naps are short, and the last look
    # decides.
    deadline = time.monotonic() + nap_ns * 1e-9
    for k in range(circle.n):
        seat = circle.seats[k]
        while True:
            left = max(0.0, min(0.001, deadline - time.monotonic()))
            if native.load().wait_all(seat, LINE, 1, circle.posted, 0.0, left) < 0:
                break
            if time.monotonic() >= deadline:
                return k
    return -1
