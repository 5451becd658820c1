"""The collectives of one group of ranks, over the seats that they have in shared memory.

Each is one exchange of ``rounds.c``: who gives what to whom, whether it is reduced, and whether the reduced parts go
back to all. A small all_reduce, and any of two ranks, lets each rank read what all have written and sum it itself, always
in rank order; a large one of more ranks lets each sum its own part and give it back. Either way all ranks have the same bits,
and the same as if one rank had summed alone. A group's collectives run in the order in which they were begun.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
from collections import deque
from collections.abc import Callable, Sequence

import torch

from shoal.comm.port import Port
from shoal.comm.rounds import (
    BACK,
    FINISHED,
    LINE,
    MISMATCH,
    REDUCE,
    REDUCE_PLEASE,
    SEAT_HEAD,
    SHARED,
    SUMMED_HERE,
    Circle,
    Exchange,
    plan,
    reduce_by,
    summed,
)
from shoal.errors import JobFailed

DIRECT_BYTES = 32 << 10
"""Up to here a sum needs no second meeting: reading everything of everybody costs less. Two ranks never need one: what
each copies is the same then."""

Part = tuple[int, torch.Tensor]
"""(rank within the group, what it gets or gives); contiguous or not."""

_KINDS = (
    "all_reduce", "all_gather", "reduce_scatter", "broadcast", "all_to_all", "reduce", "gather", "scatter", "barrier",
)  # fmt: skip
_TORCH_OPS: dict[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "max": torch.maximum, "min": torch.minimum, "product": torch.mul,
    "band": torch.bitwise_and, "bor": torch.bitwise_or, "bxor": torch.bitwise_xor,
}  # fmt: skip
OPS = ("sum", "avg", *_TORCH_OPS)
_DTYPES = (
    torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool, torch.complex64, torch.complex128,
)  # fmt: skip
_KIND_NUMBERS = {kind: number for number, kind in enumerate(_KINDS, 1)}
_OP_NUMBERS = {**{op: number for number, op in enumerate(OPS)}, "": 15}
_DTYPE_NUMBERS = {dtype: number for number, dtype in enumerate(_DTYPES)}
_ARRAYS_AT = Exchange.send.offset
_ARRAYS_BYTES = ctypes.sizeof(Exchange) - _ARRAYS_AT


class MismatchError(JobFailed):
    """The ranks of a group did not make the same call."""


class Meeting:
    """The ranks of one group, seen from one of them.

    Args:
        name: the same on all of them, and no other group's.
        ranks: the port's ranks that belong to it, in the group's order.

    Attributes:
        key: what all members mark their seats and messages with.
    """

    def __init__(self, port: Port, name: str, ranks: Sequence[int]) -> None:
        self.port, self.name, self.ranks = port, name, tuple(ranks)
        self.rank = self.ranks.index(port.rank)
        self.key = 0
        self.queue: deque[Collective] = deque()
        self.circle = Circle(n=len(self.ranks), me=self.rank, piece=port.layout.piece_bytes)
        self._connected = False
        self._spare: list[Exchange] = []
        port.take_seat(self)

    def mark(self, use: int) -> None:
        """Say which group of its name this is, the same on all ranks: it may be used again for a later group."""
        text = f"{self.name}/{use}/{','.join(map(str, self.ranks))}"
        self.key = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little") | 1

    def clear(self) -> None:
        """Forget what was begun, and where the others sit."""
        self.queue.clear()
        self.circle.turn = self.circle.posted = 0
        self._connected = False

    def leave(self) -> None:
        """Give up the seat."""
        self.port.leave_seat(self)

    def connect(self) -> bool:
        """Find the others' seats; whether all have one."""
        if not self._connected:
            key = self.key
            found = [self.port.find_seat(rank, key) for rank in self.ranks]
            self.circle.seats[: len(found)] = found
            self._connected = all(found)
        return self._connected

    def late(self, target: int) -> list[int]:
        """The ranks that have not posted as often."""
        if not self._connected:
            return [rank for rank in self.ranks if not self.port.find_seat(rank, self.key)]
        wait = self.port.native.wait_all
        seats = self.circle.seats[: len(self.ranks)]
        return [
            rank for rank, seat in zip(self.ranks, seats, strict=True) if wait(seat, LINE, 1, target, 0.0, 0.0) >= 0
        ]

    # -- what it does --------------------------------------------------------------------------------------------

    def all_reduce(self, tensor: torch.Tensor, op: str) -> Collective:
        """Replace a tensor by its sum (or what ``op`` says) over all ranks."""
        flat = tensor if tensor.is_contiguous() else tensor.contiguous()
        size, address, n = flat.nbytes, flat.data_ptr(), len(self.ranks)
        if n == 2 or size <= min(DIRECT_BYTES, self.circle.piece):
            begun = self._lay("all_reduce", SHARED | REDUCE, op, flat.dtype, size, address, size, address, size)
        else:
            begun = self._begin("all_reduce", REDUCE | BACK, op, flat, size)
            x = begun.x
            share = -(-size // (n * LINE)) * LINE
            starts = [min(k * share, size) for k in range(n + 1)]
            x.send[:n] = x.recv[:n] = [address + start for start in starts[:n]]
            x.send_bytes[:n] = x.recv_bytes[:n] = [starts[k + 1] - starts[k] for k in range(n)]
            plan(x, share)
        begun.keep.append(flat)
        if flat is not tensor:
            begun.after.append(functools.partial(tensor.copy_, flat))
        return self._start(begun)

    def all_gather(self, outputs: Sequence[torch.Tensor], given: torch.Tensor) -> Collective:
        """Put every rank's tensor into the outputs, by rank."""
        even = all(output.numel() == given.numel() for output in outputs)
        begun = self._begin("all_gather", SHARED, "", given, given.nbytes if even else 0)
        self._fill(begun, [(self.rank, given)], list(enumerate(outputs)))
        return self._start(begun)

    def all_gather_flat(self, output: torch.Tensor, given: torch.Tensor) -> Collective:
        """all_gather into one contiguous tensor."""
        flat = given if given.is_contiguous() else given.contiguous()
        size = flat.nbytes
        places = (flat.data_ptr(), size, output.data_ptr(), size)
        begun = self._lay("all_gather", SHARED, "", flat.dtype, size, *places)
        begun.keep += (flat, output)
        return self._start(begun)

    def reduce_scatter_flat(self, output: torch.Tensor, given: torch.Tensor, op: str) -> Collective:
        """reduce_scatter from one contiguous tensor into another."""
        size = output.nbytes
        places = (given.data_ptr(), size, output.data_ptr(), size)
        begun = self._lay("reduce_scatter", REDUCE, op, output.dtype, size, *places)
        begun.keep += (output, given)
        return self._start(begun)

    def all_to_all_flat(self, output: torch.Tensor, given: torch.Tensor) -> Collective:
        """all_to_all, in equal parts, from one contiguous tensor into another."""
        size = output.nbytes // len(self.ranks)
        places = (given.data_ptr(), size, output.data_ptr(), size)
        begun = self._lay("all_to_all", 0, "", given.dtype, 0, *places)
        begun.keep += (given, output)
        return self._start(begun)

    def broadcast(self, tensor: torch.Tensor, root: int) -> Collective:
        """Give everybody what the root has."""
        begun = self._begin("broadcast", SHARED, "", tensor, tensor.nbytes)
        mine = self.rank == root
        self._fill(begun, [(root, tensor)] if mine else [], [] if mine else [(root, tensor)])
        return self._start(begun)

    def reduce(self, tensor: torch.Tensor, root: int, op: str) -> Collective:
        """all_reduce, whose result only the root gets."""
        begun = self._begin("reduce", SHARED | REDUCE, op, tensor, tensor.nbytes)
        self._fill(begun, [(self.rank, tensor)], [(root, tensor)] if self.rank == root else [])
        return self._start(begun)

    def reduce_scatter(self, output: torch.Tensor, given: Sequence[torch.Tensor], op: str) -> Collective:
        """Reduce the tensors that all ranks give for this one into the output."""
        even = all(part.numel() == output.numel() for part in given)
        begun = self._begin("reduce_scatter", REDUCE, op, output, output.nbytes if even else 0)
        self._fill(begun, list(enumerate(given)), [(self.rank, output)])
        return self._start(begun)

    def all_to_all(self, outputs: Sequence[torch.Tensor], given: Sequence[torch.Tensor]) -> Collective:
        """Give each rank a tensor and get one of each; they may all differ in size."""
        begun = self._begin("all_to_all", 0, "", given[0], 0)
        self._fill(begun, list(enumerate(given)), list(enumerate(outputs)))
        return self._start(begun)

    def gather(self, outputs: Sequence[torch.Tensor], given: torch.Tensor, root: int) -> Collective:
        """Put every rank's tensor into the root's outputs."""
        begun = self._begin("gather", SHARED, "", given, 0)
        self._fill(begun, [(self.rank, given)], list(enumerate(outputs)) if self.rank == root else [])
        return self._start(begun)

    def scatter(self, output: torch.Tensor, given: Sequence[torch.Tensor], root: int) -> Collective:
        """Give each rank its tensor of those that the root has."""
        begun = self._begin("scatter", 0, "", output, 0)
        self._fill(begun, list(enumerate(given)) if self.rank == root else [], [(root, output)])
        return self._start(begun)

    def barrier(self) -> Collective:
        """Wait for everybody."""
        return self._start(self._lay("barrier", SHARED, "", torch.uint8, 0, 0, 0, 0, 0))

    # -- how -----------------------------------------------------------------------------------------------------

    def _begin(self, kind: str, flags: int, op: str, like: torch.Tensor, size: int) -> Collective:
        x = self._exchange()
        ctypes.memset(ctypes.addressof(x) + _ARRAYS_AT, 0, _ARRAYS_BYTES)
        x.flags = flags
        x.dtype, x.divisor, x.signature = self._words_of(kind, flags, op, like.dtype, size)
        return Collective(self, x, kind, like.dtype, op)

    def _lay(
        self, kind: str, flags: int, op: str, dtype: torch.dtype, size: int,
        given: int, given_bytes: int, taken: int, taken_bytes: int,
    ) -> Collective:  # fmt: skip
        """An exchange in which all parts are of one size and lie one behind the other: see ``shoal_lay`` in rounds.c."""
        x = self._exchange()
        self.port.lay(x, flags, *self._words_of(kind, flags, op, dtype, size), given, given_bytes, taken, taken_bytes)
        return Collective(self, x, kind, dtype, op)

    def _exchange(self) -> Exchange:
        return self._spare.pop() if self._spare else Exchange(circle=ctypes.pointer(self.circle))

    def _words_of(self, kind: str, flags: int, op: str, dtype: torch.dtype, size: int) -> tuple[int, int, int]:
        """What sums here, by what it is divided, and what says to others which call this is."""
        number = _DTYPE_NUMBERS.get(dtype, 31)
        signature = _KIND_NUMBERS[kind] | flags << 4 | _OP_NUMBERS[op] << 8 | number << 12 | size << 20
        return (
            SUMMED_HERE.get(dtype, 0) if op in ("sum", "avg") else 0,
            len(self.ranks) if op == "avg" else 0,
            signature,
        )

    def _fill(self, begun: Collective, given: Sequence[Part], taken: Sequence[Part]) -> None:
        """Say what each rank gets of me, and where what I get of each belongs."""
        x, me = begun.x, self.rank
        own = None
        for k, tensor in given:
            flat = tensor if tensor.is_contiguous() else tensor.contiguous()
            begun.keep.append(flat)
            x.send[k], x.send_bytes[k] = flat.data_ptr(), flat.numel() * flat.element_size()
            if k == me:
                own = tensor
        for k, tensor in taken:
            if k == me and not x.flags & REDUCE:
                # What stays here goes the short way.
                if own is not None and own.data_ptr() != tensor.data_ptr():
                    tensor.copy_(own.view(tensor.shape) if own.is_contiguous() else own.reshape(tensor.shape))
                continue
            place = tensor
            if not tensor.is_contiguous():
                place = torch.empty_like(tensor, memory_format=torch.contiguous_format)
                begun.after.append(functools.partial(tensor.copy_, place))
            begun.keep.append(place)
            x.recv[k], x.recv_bytes[k] = place.data_ptr(), place.numel() * place.element_size()
        n = len(self.ranks)
        plan(x, max(*x.send_bytes[:n], *x.recv_bytes[:n]))

    def _start(self, begun: Collective) -> Collective:
        """Put a collective into the row, and do of it what can be done without waiting."""
        self.queue.append(begun)
        if len(self.queue) == 1 and self.port.generation_holds():
            begun.step(0, 0, 0)
        return begun

    def recycle(self, x: Exchange) -> None:
        self._spare.append(x)


class Collective:
    """One collective, under way: see ``port.Pending``."""

    def __init__(self, meeting: Meeting, x: Exchange, kind: str, dtype: torch.dtype, op: str) -> None:
        self._meeting = meeting
        self.x = x
        self._kind, self._dtype, self._op = kind, dtype, op
        self.keep: list[torch.Tensor] = []
        self.after: list[Callable[[], object]] = []
        self.done = False

    def advance(self, spin_ns: int, yields: int, nap_ns: int) -> bool:
        queue = self._meeting.queue
        while not self.done and queue:
            first = queue[0]
            if not first.step(spin_ns, yields, nap_ns):
                return False
        return self.done

    def step(self, spin_ns: int, yields: int, nap_ns: int) -> bool:
        """Go on with this one, which is the first of its group's."""
        meeting = self._meeting
        if not meeting.connect():
            meeting.port.doze(nap_ns)
            return False
        while True:
            state = meeting.port.advance(self.x, spin_ns, yields, nap_ns)
            if state == FINISHED:
                break
            if state == REDUCE_PLEASE:
                reduce_by(self.x, self._dtype, self._reduced)
            elif state == MISMATCH:
                meeting.port.check()
                raise MismatchError(self._mismatch())
            else:
                return False
        meeting.queue.popleft()
        self.done = True
        for then in self.after:
            then()
        meeting.recycle(self.x)
        self.keep.clear()
        return True

    def describe(self) -> str:
        return f"{self._kind} in group {self._meeting.name}"

    def missing(self) -> list[int]:
        return self._meeting.late(self._meeting.circle.posted)

    def _reduced(self, values: list[torch.Tensor]) -> torch.Tensor:
        if self._op in ("sum", "avg"):
            return summed(values, self.x.divisor)
        half = self._op == "product" and self._dtype in (torch.bfloat16, torch.float16)
        wide = [value.float() for value in values] if half else values
        return functools.reduce(_TORCH_OPS[self._op], wide).to(self._dtype)

    def _mismatch(self) -> str:
        meeting, other = self._meeting, self.x.other
        half = (
            (meeting.circle.seats[other] or 0) + SEAT_HEAD + (meeting.circle.turn & 1) * (LINE + meeting.circle.piece)
        )
        theirs = ctypes.c_uint64.from_address(half).value
        return (
            f"Rank {meeting.port.rank} calls {_words(self.x.signature)} in group {meeting.name} "
            f"and rank {meeting.ranks[other]} calls {_words(theirs)}; all ranks of a group make the same calls in one order."
        )


def _words(signature: int) -> str:
    """A signature as a person would say it: 'all_reduce (sum) of 64 bytes of float32'."""
    kind, op, number, size = (signature & 15) - 1, signature >> 8 & 15, signature >> 12 & 31, signature >> 20
    text = _KINDS[kind] if 0 <= kind < len(_KINDS) else "something else"
    text += f" ({OPS[op]})" if op < len(OPS) else ""
    dtype = str(_DTYPES[number]).removeprefix("torch.") if number < len(_DTYPES) else "its type"
    return text + (f" of {size} bytes of {dtype}" if size else "")
