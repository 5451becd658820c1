"""What readers and publishers of a run say to each other: typed messages, a small head of msgpack and frames of bytes.

Nothing on the wire is ever executed: a head is decoded into one of the classes below or refused, and frames are copied
where the head says, after their sizes have been compared with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import msgspec

BLOCK_BYTES = 4096
"""What is sent is whole blocks of the weights' bytes."""

_MOST_HEAD_BYTES = 16 << 20


class Malformed(Exception):
    """A message that is none; its text says why."""


class Tensor(msgspec.Struct, frozen=True):
    """Where a tensor lies in the published bytes: ``dtype`` as in ``float32``, ``offset`` in bytes."""

    names: tuple[str, ...]
    dtype: str
    shape: tuple[int, ...]
    offset: int


def nbytes(tensor: Tensor) -> int:
    """The size of a tensor. Raises Malformed where its dtype is none."""
    import torch

    dtype = getattr(torch, tensor.dtype, None)
    if not isinstance(dtype, torch.dtype):
        raise Malformed(f"{tensor.dtype} is no dtype")
    return math.prod(tensor.shape) * dtype.itemsize


class Table(msgspec.Struct, frozen=True):
    """A table of rows by key: where it is in the model, and how its rows are; ``memory``: what they may take, in bytes."""

    name: str
    width: int
    dtype: str
    shards: int
    seed: int
    memory: int | None


class Shared(msgspec.Struct, frozen=True):
    """Where publications lie in shared memory (``shoal.ps.banks``), for who is on the same machine.

    ``boot`` tells machines apart; ``fd`` of the process ``pid`` is the file ``device``, ``inode``; ``size`` bytes a bank.
    """

    boot: str
    pid: int
    fd: int
    device: int
    inode: int
    size: int
    banks: int


class Hello(msgspec.Struct, tag="hello", frozen=True):
    """A reader asks what there is."""


class Welcome(msgspec.Struct, tag="welcome", frozen=True):
    """What is published: ``size`` bytes of tensors, held by ``servers`` servers; ``shared``: where, for who is here."""

    run: str
    size: int
    servers: int
    tensors: tuple[Tensor, ...]
    tables: tuple[Table, ...] = ()
    shared: Shared | None = None


class Next(msgspec.Struct, tag="next", frozen=True):
    """A reader has publication ``have`` (0: nothing) and asks for whatever is newer, as soon as there is something.

    ``shares``: it looks into the shared memory that it was told of.
    """

    have: int
    shares: bool = False


class Rows(msgspec.Struct, tag="rows", frozen=True):
    """A reader that has publication ``have`` but for its rows asks for some of those of one shard, from ``at`` on.

    ``cold``: of those on disk, which come after those in memory.
    """

    have: int
    table: int
    shard: int
    cold: bool
    at: int


class Bye(msgspec.Struct, tag="bye", frozen=True):
    """A reader leaves."""


class Changed(msgspec.Struct, frozen=True):
    """Of a table, so many rows are new or have changed, and so many are no longer there."""

    table: int
    rows: int
    gone: int


class Update(msgspec.Struct, tag="update", frozen=True):
    """Publication ``number``: what differs from publication ``base``; a snapshot where ``base`` is 0.

    ``versions``: how many updates each server had made; ``taken_at``: when the first of them was read, in seconds of the Unix
    clock; ``runs``: (first block, number of blocks) of the bytes that follow in one frame. None of them: nothing is new.
    Behind them come for each of ``changed`` the keys of its rows, those that are gone, and the rows. A snapshot has no rows:
    the reader asks for them, and has a whole copy with the first update after them that is ``whole``. For who shares the memory
    there are no runs: all bytes are in ``bank``.
    """

    number: int
    base: int
    versions: tuple[int, ...]
    taken_at: float
    runs: tuple[tuple[int, int], ...]
    changed: tuple[Changed, ...] = ()
    whole: bool = True
    bank: int | None = None


class Piece(msgspec.Struct, tag="piece", frozen=True):
    """So many rows of a shard, keys first; the next ones begin at ``after``, None after the last of this kind."""

    table: int
    shard: int
    cold: bool
    rows: int
    after: int | None


class Closed(msgspec.Struct, tag="closed", frozen=True):
    """The run has ended: there will be nothing newer."""

    reason: str


FromReader = Hello | Next | Rows | Bye
FromPublisher = Welcome | Update | Piece | Closed
_encoder = msgspec.msgpack.Encoder()
_from_reader = msgspec.msgpack.Decoder(FromReader)
_from_publisher = msgspec.msgpack.Decoder(FromPublisher)


def encode(message: msgspec.Struct) -> bytes:
    """The head of a message."""
    return _encoder.encode(message)


def decode_head(decoder: Any, frames: Sequence[Any]) -> Any:
    """Read the first frame by a decoder. Raises Malformed."""
    if not frames or memoryview(frames[0]).nbytes > _MOST_HEAD_BYTES:
        raise Malformed("it has no head, or too large a one")
    try:
        return decoder.decode(frames[0])
    except (msgspec.DecodeError, ValueError, RecursionError) as error:
        raise Malformed(str(error)) from None


def decode_request(frames: Sequence[Any]) -> FromReader:
    """Read what a reader sent. Raises Malformed."""
    if len(frames) != 1:
        raise Malformed(f"{len(frames)} frames where one belongs")
    return decode_head(_from_reader, frames)  # type: ignore[no-any-return]


def decode_answer(
    frames: Sequence[Any], size: int | None, tables: Sequence[Table] = ()
) -> tuple[FromPublisher, memoryview]:
    """Read what a publisher sent: the message and the bytes with it. Raises Malformed.

    ``size``: of what is published, where that is known; runs of blocks beyond it are refused, and rows of other than ``tables``.
    """
    message: FromPublisher = decode_head(_from_publisher, frames)
    payload = memoryview(frames[1]) if len(frames) > 1 else memoryview(b"")
    wanted = 0
    if isinstance(message, Update):
        for first, count in message.runs:
            start, stop = first * BLOCK_BYTES, (first + count) * BLOCK_BYTES
            if first < 0 or count <= 0 or size is None or start >= size:
                raise Malformed(f"blocks {first} to {first + count} of {size} bytes")
            wanted += min(stop, size) - start
        wanted += sum(_rows_bytes(tables, c.table, c.rows, c.gone) for c in message.changed)
    elif isinstance(message, Piece):
        wanted = _rows_bytes(tables, message.table, message.rows, 0)
    if len(frames) != 1 + (wanted > 0) or payload.nbytes != wanted:
        raise Malformed(f"{payload.nbytes} bytes where {wanted} belong")
    return message, payload


def _rows_bytes(tables: Sequence[Table], number: int, rows: int, gone: int) -> int:
    if not 0 <= number < len(tables) or rows < 0 or gone < 0:
        raise Malformed(f"{rows} rows of table {number} where there are {len(tables)}")
    return 8 * (rows + gone) + rows * row_bytes(tables[number])


def row_bytes(table: Table) -> int:
    """What the numbers of a row take. Raises Malformed where they are of no kind that rows are."""
    size = {"float32": 4, "float64": 8}.get(table.dtype)
    if size is None or table.width < 1:
        raise Malformed(f"rows of {table.width} × {table.dtype}")
    return table.width * size
