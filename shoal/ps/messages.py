"""What clients and servers of a parameter server say to each other: a small typed head of msgpack, and frames of tensors.

Every request has a number, and its answer the same one. Nothing on the wire is ever executed: a head is decoded into one of
the classes below or refused, and the size of every frame is compared with what the head and the shard say before it is
looked at. Frames are used where they arrived, without a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import torch

from shoal.comm.codecs import bytes_of, codec
from shoal.errors import PlanError
from shoal.ps.applied import NOTHING, PushId
from shoal.ps.dense import Groups
from shoal.ps.shard import Kept, Push, RowGradients, Snapshot
from shoal.ps.wire import Malformed, decode_head

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
                  torch.int8, torch.uint8, torch.bool)
}  # fmt: skip


class Tensor(msgspec.Struct, frozen=True):
    """A frame that is a tensor: its ``name`` (or none), dtype as in ``float32``, shape, and codec."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    codec: str = "none"


class Block(msgspec.Struct, frozen=True):
    """A frame that is a dense piece: weights, or a gradient."""

    piece: int
    codec: str = "none"


class RowBlock(msgspec.Struct, frozen=True):
    """Three frames: keys, counts and gradients of ``rows`` rows of a table."""

    table: int
    rows: int
    codec: str = "none"


# -- requests ----------------------------------------------------------------------------------------------------


class PushHead(msgspec.Struct, tag="push", frozen=True, kw_only=True):
    """Apply a push; or with ``staged`` keep it until it is told to be applied with others (``Commit``).

    ``pulled``: the server's version that its gradients are of, where that matters; ``staleness``: what has come of that, as one
    server tells another, and its log.
    """

    number: int
    ids: tuple[PushId, ...]
    step: int
    settled: PushId
    scale: float
    groups: Groups | None
    dense: tuple[Block, ...]
    rows: tuple[RowBlock, ...]
    staged: bool = False
    pulled: int | None = None
    staleness: int | None = None


class Norm(msgspec.Struct, tag="norm", frozen=True, kw_only=True):
    """The squared norm of the sum of staged pushes."""

    number: int
    ids: tuple[PushId, ...]


class Multiply(msgspec.Struct, tag="multiply", frozen=True, kw_only=True):
    """The scalar products of L-BFGS's vectors, with the sum of staged pushes times ``scale`` as the gradient."""

    number: int
    ids: tuple[PushId, ...]
    scale: float


class Commit(msgspec.Struct, tag="commit", frozen=True, kw_only=True):
    """Apply the sum of staged pushes as one."""

    number: int
    ids: tuple[PushId, ...]
    settled: PushId = NOTHING
    scale: float = 1.0
    groups: Groups | None = None


class Pull(msgspec.Struct, tag="pull", frozen=True):
    """All dense pieces; nothing where the server's version is ``have``."""

    number: int
    have: int = -1


class PullRows(msgspec.Struct, tag="pull_rows", frozen=True):
    """Rows of a table: a frame of different keys, int64."""

    number: int
    table: int
    keys: int
    step: int = 0


class Take(msgspec.Struct, tag="take", frozen=True):
    """The state of pieces and of shards of tables, or of everything where both are None."""

    number: int
    pieces: tuple[int, ...] | None = None
    row_shards: dict[str, tuple[int, ...]] | None = None


class Put(msgspec.Struct, tag="put", frozen=True, kw_only=True):
    """Take up a snapshot: with ``whole`` everything with version and ledger, else its pieces and rows."""

    number: int
    kept: Kept
    tensors: tuple[Tensor, ...]
    whole: bool


class Hold(msgspec.Struct, tag="hold", frozen=True, kw_only=True):
    """Hold these pieces and shards of tables from now on, and forget all others; see ``Shard.hold``."""

    number: int
    pieces: tuple[int, ...]
    row_shards: dict[str, tuple[int, ...]]
    version: int = 0
    settled: PushId = NOTHING


class Ping(msgspec.Struct, tag="ping", frozen=True):
    """Whether a server is there, and at which version."""

    number: int


# -- answers -----------------------------------------------------------------------------------------------------


class Done(msgspec.Struct, tag="done", frozen=True):
    """It is done; ``new``: whether it had not been before.

    Of a push: ``version`` is how many updates there were with it, and ``staleness`` what it had when it was applied.
    """

    number: int
    version: int
    new: bool = True
    staleness: int | None = None


class Pulled(msgspec.Struct, tag="pulled", frozen=True):
    """Dense pieces of one version."""

    number: int
    version: int
    dense: tuple[Block, ...]


class PulledRows(msgspec.Struct, tag="pulled_rows", frozen=True):
    """A frame of rows, (keys, width), of one version."""

    number: int
    version: int
    rows: Tensor


class Normed(msgspec.Struct, tag="normed", frozen=True):
    """The squared norm that was asked for."""

    number: int
    squared: float


class Multiplied(msgspec.Struct, tag="multiplied", frozen=True):
    """The products that were asked for: see ``shoal.ps.lbfgs.multiply``."""

    number: int
    products: tuple[float, ...]


class Taken(msgspec.Struct, tag="taken", frozen=True):
    """The state that was asked for."""

    number: int
    kept: Kept
    tensors: tuple[Tensor, ...]


class Recovered(msgspec.Struct, tag="recovered", frozen=True):
    """A server has gone on from a checkpoint and its log; ``seconds``: what the parts of that took."""

    number: int
    version: int
    seconds: dict[str, float]


class Refused(msgspec.Struct, tag="refused", frozen=True):
    """It was not done.

    ``missing``: because pushes that it is about are not staged here: send them again. ``damaged``: because a checkpoint is.
    """

    number: int
    reason: str
    missing: bool = False
    damaged: bool = False


Request = PushHead | Norm | Multiply | Commit | Pull | PullRows | Take | Put | Hold | Ping
Answer = Done | Pulled | PulledRows | Normed | Multiplied | Taken | Recovered | Refused
_requests = msgspec.msgpack.Decoder(Request)
_answers = msgspec.msgpack.Decoder(Answer)


def decode_request(frames: Sequence[Any]) -> Request:
    """Read the head of what a client sent; its frames are looked at by whom they are for. Raises Malformed."""
    return decode_head(_requests, frames)  # type: ignore[no-any-return]


def decode_answer(frames: Sequence[Any]) -> Answer:
    """Read the head of what a server sent. Raises Malformed."""
    return decode_head(_answers, frames)  # type: ignore[no-any-return]


# -- frames ------------------------------------------------------------------------------------------------------


class Forms:
    """What the dense pieces and the tables of a run are like: what frames are checked against."""

    def __init__(self, pieces: Mapping[int, tuple[int, torch.dtype]], tables: Mapping[int, tuple[int, torch.dtype]]) -> None:
        """``pieces``: how many numbers of which dtype; ``tables``: how wide, of which dtype."""
        self.pieces, self.tables = pieces, tables


def pack_push(
    push: Push, number: int, codec_of: Callable[[int], str] = lambda piece: "none", staged: bool = False
) -> tuple[PushHead, list[Any]]:
    """A push as a head and frames, which are views of it wherever the codec lets them be.

    ``codec_of``: the name of the codec for a piece's gradient; rows are sent as they are.
    """
    frames: list[Any] = []
    blocks, row_blocks = [], []
    for piece, gradient in push.dense.items():
        name = codec_of(piece)
        blocks.append(Block(piece, name))
        frames.append(codec(name).encode(gradient))
    for table, rows in push.rows.items():
        row_blocks.append(RowBlock(table, len(rows.keys)))
        frames += [raw_bytes(rows.keys), raw_bytes(rows.counts), bytes_of(rows.gradients.contiguous())]
    groups = None if push.groups is None else tuple(push.groups)
    head = PushHead(
        number=number, ids=push.ids, step=push.step, settled=push.settled, scale=push.scale, groups=groups,
        dense=tuple(blocks), rows=tuple(row_blocks), staged=staged, staleness=push.staleness,
    )  # fmt: skip
    return head, frames


def unpack_push(head: PushHead, frames: Sequence[Any], forms: Forms) -> Push:
    """A push out of its head and the frames behind it, as views of these. Raises Malformed."""
    if len(frames) != len(head.dense) + 3 * len(head.rows) or not head.ids:
        raise Malformed(f"{len(frames)} frames and {len(head.ids)} ids do not make this push")
    if len({b.piece for b in head.dense}) != len(head.dense) or len({b.table for b in head.rows}) != len(head.rows):
        raise Malformed("the push has a piece or a table twice")
    dense: dict[int, torch.Tensor] = {}
    for block, frame in zip(head.dense, frames, strict=False):
        if block.piece not in forms.pieces:
            raise Malformed(f"there is no piece {block.piece} here")
        dense[block.piece] = _decode(frame, block.codec, *forms.pieces[block.piece])
    rows: dict[int, RowGradients] = {}
    rest = frames[len(head.dense) :]
    for k, row_block in enumerate(head.rows):
        if row_block.table not in forms.tables or row_block.rows < 0:
            raise Malformed(f"there is no table {row_block.table} here, or no rows")
        width, dtype = forms.tables[row_block.table]
        keys = _array(rest[3 * k], np.dtype(np.int64), row_block.rows)
        counts = _array(rest[3 * k + 1], np.dtype(np.uint32), row_block.rows)
        gradients = _decode(rest[3 * k + 2], row_block.codec, row_block.rows * width, dtype)
        rows[row_block.table] = RowGradients(keys, counts, gradients.view(row_block.rows, width))
    return Push(
        ids=head.ids, step=head.step, settled=head.settled, dense=dense, rows=rows, scale=head.scale, groups=head.groups,
        staleness=head.staleness,
    )  # fmt: skip


def unpack_keys(head: PullRows, frames: Sequence[Any]) -> np.ndarray:
    """The keys of a request for rows. Raises Malformed."""
    if len(frames) != 1 or head.keys < 0:
        raise Malformed(f"{len(frames)} frames where one of keys belongs")
    return _array(frames[0], np.dtype(np.int64), head.keys)


def pack_tensors(tensors: Mapping[str, torch.Tensor]) -> tuple[tuple[Tensor, ...], list[Any]]:
    """Named tensors as heads and frames, without copying."""
    heads = tuple(Tensor(name, str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in tensors.items())
    return heads, [bytes_of(t.contiguous()) if t.numel() else b"" for t in tensors.values()]


def unpack_tensors(heads: Sequence[Tensor], frames: Sequence[Any]) -> dict[str, torch.Tensor]:
    """The other way, as views of the frames. Raises Malformed."""
    if len(heads) != len(frames) or len({head.name for head in heads}) != len(heads):
        raise Malformed(f"{len(frames)} frames where {len(heads)} of different names belong")
    found: dict[str, torch.Tensor] = {}
    for head, frame in zip(heads, frames, strict=True):
        if head.dtype not in _DTYPES or any(n < 0 for n in head.shape):
            raise Malformed(f"{head.dtype} of {head.shape} is no tensor")
        numel = int(np.prod(head.shape, dtype=object)) if head.shape else 1
        try:
            found[head.name] = _decode(frame, head.codec, numel, _DTYPES[head.dtype]).view(head.shape)
        except (RuntimeError, TypeError, OverflowError) as error:
            # Nothing along one dim and too much along another.
            raise Malformed(str(error)) from None
    return found


def pack_snapshot(snapshot: Snapshot) -> tuple[Kept, tuple[Tensor, ...], list[Any]]:
    """A snapshot's head, its tensors' heads, and frames."""
    return snapshot.kept, *pack_tensors(snapshot.tensors)


def unpack_snapshot(message: Put | Taken, frames: Sequence[Any]) -> Snapshot:
    """The other way. Raises Malformed."""
    return Snapshot(message.kept, unpack_tensors(message.tensors, frames))


def raw_bytes(array: np.ndarray) -> memoryview:
    """The bytes of an array, without copying where it is contiguous."""
    raw: Any = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return memoryview(raw)


def _decode(frame: Any, name: str, numel: int, dtype: torch.dtype) -> torch.Tensor:
    try:
        return codec(name).decode(memoryview(frame).cast("B"), numel, dtype)
    except (ValueError, TypeError, PlanError) as error:
        raise Malformed(str(error)) from None


def _array(frame: Any, dtype: np.dtype[Any], count: int) -> np.ndarray:
    data = memoryview(frame).cast("B")
    if data.nbytes != count * dtype.itemsize:
        raise Malformed(f"{data.nbytes} bytes where {count} of {dtype} belong")
    found = np.frombuffer(data, dtype)
    return found if found.flags.aligned else found.copy()


