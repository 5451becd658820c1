"""The parameter table: where each tensor of a model lies in flat memory. Pure values that travel between processes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch

from shoal.comm.grid import Grid
from shoal.comm.parts import Region

ALIGNMENT = 64
FROZEN = -1


class _Sized:
    """The sizes that follow from a shape and a dtype."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * self.dtype.itemsize


@dataclass(frozen=True)
class TensorSpec(_Sized):
    """One tensor that the run keeps: one of the model's, or, where the model is split, a part of one.

    Attributes:
        names: every name it has in the state_dict; the first is the one it is filed under.
        shape: of the tensor that is kept.
        offset: bytes from the start of its region.
        group: index of its optimizer group, or FROZEN where no optimizer updates it.
        persistent: whether it is in the state_dict at all (buffers may not be).
        whole: the shape in the model, where this is a part.
        regions: which part it is.
        owner: whose part it is (see ``Grid``): who computes its gradient, and updates it.
        leads: whether it is the first part, which also speaks for what all parts have in common.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int
    group: int = FROZEN
    persistent: bool = True
    whole: tuple[int, ...] | None = None
    regions: tuple[Region, ...] = ()
    owner: int = 0
    leads: bool = True

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def whole_shape(self) -> tuple[int, ...]:
        return self.shape if self.whole is None else self.whole

    def view_in(self, page: torch.Tensor) -> torch.Tensor:
        """This tensor in bytes (1-D, uint8) that are laid out as its region is."""
        return page[self.offset : self.offset + self.nbytes].view(self.dtype).view(self.shape)


@dataclass(frozen=True)
class StateSpec(_Sized):
    """A tensor that an optimizer keeps for one parameter, of any shape. ``offset`` is within the state region."""

    parameter: int
    key: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int


@dataclass(frozen=True)
class Echo:
    """A second gradient of a parameter, from another stage of the pipeline that uses the same weight.

    Attributes:
        parameter: index into the table.
        owner: who computes this gradient; it is not the parameter's own owner.
        offset: bytes from the start of a replica's echoes.
    """

    parameter: int
    owner: int
    offset: int


@dataclass(frozen=True)
class ParameterTable:
    """Everything about a model and its optimizer that decides how memory is laid out.

    Parameters that are trained come first, ordered by owner, dtype and group, so that neighbours can be updated together;
    ``trained_bytes`` is where they end. Gradients and per-element optimizer state use the same offsets as the weights.

    Attributes:
        elementwise: the optimizer treats every element alike, so that its work can be cut anywhere.
        state_keys: for an elementwise optimizer the names of its per-element tensors.
        scalar_keys: and of its per-parameter 0-dim tensors (Adam's ``step``).
        scalar_dtype: of these.
        states: for any other optimizer each tensor that it keeps.
        splittable: such an optimizer looks at one tensor at a time, so that tensors can be dealt out to workers.
        echoes: gradients that another stage has for a parameter of this table (a tied weight), to be added to its own.
        ranges: where the table is of one process's own memory, the bytes of the trained weights that it updates, in order
            and never in one chunk with one another; None for all that its lane has.
        chunk_bytes: how much is updated, and undone, as one.
    """

    parameters: tuple[TensorSpec, ...]
    buffers: tuple[TensorSpec, ...]
    trained_bytes: int
    weight_bytes: int
    buffer_bytes: int
    elementwise: bool
    state_keys: tuple[str, ...] = ()
    scalar_keys: tuple[str, ...] = ()
    scalar_dtype: torch.dtype = torch.float32
    states: tuple[StateSpec, ...] = ()
    state_bytes: int = 0
    splittable: bool = True
    model_keys: tuple[str, ...] = ()
    echoes: tuple[Echo, ...] = ()
    echo_bytes: int = 0
    ranges: tuple[tuple[int, int], ...] | None = None
    chunk_bytes: int = 1 << 20

    def span(self, owner: int) -> tuple[int, int]:
        """Bytes ``start`` to ``stop`` of the trained weights that are an owner's."""
        own = [spec for spec in self.trained if spec.owner == owner]
        return (own[0].offset, align(own[-1].offset + own[-1].nbytes)) if own else (0, 0)

    @property
    def state_span(self) -> int:
        """Bytes of each of an elementwise optimizer's state tensors: of what is updated here."""
        if self.ranges is None:
            return self.trained_bytes
        return sum(align(stop - start) for start, stop in self.ranges)

    def state_place(self, start: int) -> int:
        """Where the state of the weights from byte ``start`` on lies in such a tensor."""
        at = 0
        for low, high in self.ranges or ():
            if low <= start < high:
                return at + start - low
            at += align(high - low)
        return start if self.ranges is None else at

    @property
    def trained(self) -> tuple[TensorSpec, ...]:
        return tuple(p for p in self.parameters if p.group != FROZEN)


def align(size: int) -> int:
    """Round a number of bytes up to a whole cache line."""
    return -(-size // ALIGNMENT) * ALIGNMENT


@dataclass(frozen=True)
class Piece:
    """Elements ``start`` to ``stop`` of a parameter (an index into the table)."""

    parameter: int
    start: int
    stop: int


@dataclass(frozen=True)
class Chunk:
    """A run of bytes that is updated, and undone, as one: ``start`` to ``stop`` in the weights' region."""

    start: int
    stop: int
    pieces: tuple[Piece, ...]


CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Lane:
    """What one worker updates, and from whose gradients.

    Usually that is a slice of the shared weights, from everybody's gradients. A worker that trains alone for some steps
    (``local_steps``) updates all of a replica of its own, from its own gradients.

    Attributes:
        start, stop: bytes of the trained weights.
        sources: the stripes that are summed.
        replica: index of the weights' and the state's copy that is updated; None for the shared one.
    """

    rank: int
    start: int
    stop: int
    sources: tuple[int, ...]
    replica: int | None = None


def lane_of(table: ParameterTable, part: int, grid: Grid, local: bool) -> Lane:
    """The lane of a worker: a slice of what its owner has; or of a server: a slice of everything."""
    if local:
        return Lane(part, 0, table.trained_bytes, (part,), part)
    if grid.servers:
        start, stop = slice_bounds(table.trained_bytes, grid.servers)[part]
        return Lane(part, start, stop, tuple(range(grid.stripes)))
    owner = grid.owner(part)
    members = grid.ranks_of(owner)
    begin, end = table.span(owner) if grid.owners > 1 else (0, table.trained_bytes)
    start, stop = slice_bounds(end - begin, len(members))[members.index(part)]
    return Lane(part, begin + start, begin + stop, tuple(range(grid.stripes)))


def slice_bounds(total: int, parts: int) -> list[tuple[int, int]]:
    """Cut ``total`` bytes into ``parts`` slices of nearly equal size, each beginning on a cache line."""
    lines = -(-total // ALIGNMENT)
    cuts = [min(total, lines * k // parts * ALIGNMENT) for k in range(parts)] + [total]
    return list(zip(cuts[:-1], cuts[1:], strict=True))


def chunks_of(table: ParameterTable, start: int, stop: int, chunk_bytes: int = CHUNK_BYTES) -> list[Chunk]:
    """Cut a worker's slice into chunks: each of one dtype, no longer than ``chunk_bytes``.

    A chunk's range may hold the padding between parameters; its pieces do not.
    """
    chunks: list[Chunk] = []
    pieces: list[Piece] = []
    begin = end = 0
    dtype: torch.dtype | None = None

    def close() -> None:
        if pieces:
            chunks.append(Chunk(begin, end, tuple(pieces)))
            pieces.clear()

    for index, spec in enumerate(table.trained):
        low, high = max(start, spec.offset), min(stop, spec.offset + spec.nbytes)
        width = spec.dtype.itemsize
        while low < high:
            if not pieces or dtype != spec.dtype or low - begin >= chunk_bytes:
                close()
                begin, dtype = low, spec.dtype
            end = min(high, begin + chunk_bytes)
            pieces.append(Piece(index, (low - spec.offset) // width, (end - spec.offset) // width))
            low = end
    close()
    return chunks


def chunks_of_lane(table: ParameterTable, lane: Lane) -> list[Chunk]:
    """The chunks that a worker updates, in order."""
    if table.ranges is None:
        return chunks_of(table, lane.start, lane.stop, table.chunk_bytes)
    return [chunk for start, stop in table.ranges for chunk in chunks_of(table, start, stop, table.chunk_bytes)]


def deal_tensors(table: ParameterTable, parts: int) -> list[list[int]]:
    """Deal whole parameters out to workers, the largest first, always to the one with the fewest bytes.

    All go to the first worker where the optimizer may look across tensors.
    """
    trained = table.trained
    if not table.splittable:
        return [list(range(len(trained)))] + [[] for _ in range(parts - 1)]
    hands: list[list[int]] = [[] for _ in range(parts)]
    held = [0] * parts
    for index in sorted(range(len(trained)), key=lambda i: (-trained[i].nbytes, i)):
        least = min(range(parts), key=lambda k: (held[k], k))
        hands[least].append(index)
        held[least] += trained[index].nbytes
    return [sorted(hand) for hand in hands]
