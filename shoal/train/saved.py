"""Bytes of weights and state: how the undo log keeps them, and what a checkpoint calls them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from shoal.comm.lines import LINE_BYTES
from shoal.comm.table import TensorSpec, align


@dataclass(frozen=True)
class Saved:
    """Bytes of a tensor that a checkpoint takes: where they go in the tensor, and a view of them.

    ``part``: the part of a whole tensor that ``start_byte`` counts from the beginning of, where it is kept in parts.
    """

    kind: str
    name: str
    start_byte: int
    data: torch.Tensor
    part: TensorSpec | None = None


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor's bytes, 1-D uint8, without copying."""
    return tensor.reshape(-1).view(torch.uint8)


def lane_kind(kind: str, replica: int | None) -> str:
    """How a checkpoint names what a replica has of its own: the first one's names are the plain ones."""
    return f"{kind}@{replica}" if replica else kind


def save_ranges(undo: torch.Tensor, ranges: Sequence[torch.Tensor]) -> None:
    """Copy bytes to the undo log, one range after the other."""
    at = 0
    for data in ranges:
        undo[at : at + data.numel()].copy_(data)
        at += align(data.numel())


def restore_ranges(undo: torch.Tensor, ranges: Sequence[torch.Tensor]) -> None:
    """Copy them back."""
    at = 0
    for data in ranges:
        data.copy_(undo[at : at + data.numel()])
        at += align(data.numel())


@dataclass(frozen=True)
class Lines:
    """Some lines of a tensor, where only these have changed.

    Attributes:
        whole: the bytes that they are counted in: ``data`` of it is what they belong to.
        numbers: int64, from its beginning.
        data: (n, bytes of a line); the last one of the tensor may go beyond its end.
    """

    whole: Saved
    numbers: np.ndarray
    data: np.ndarray


@dataclass(frozen=True)
class Applied:
    """Gradients of rows that were applied to a table: ``step`` and ``scale`` as ``Table.push`` takes them, ``lr_factor`` as
    ``Table.scale_lr`` does."""

    table: int
    keys: np.ndarray
    counts: np.ndarray
    rows: torch.Tensor
    step: int
    scale: float
    lr_factor: float = 1.0


def cut_to_lines(
    saved: Iterable[Saved], bounds: Sequence[tuple[int, int]], held: Sequence[torch.Tensor], numbers: np.ndarray
) -> Iterator[Saved | Lines]:
    """What has changed where only some lines of a chunk have.

    Args:
        saved: of each piece the weights, its state in order, and perhaps scalars, which stay whole.
        bounds: of each piece its first line in the chunk, and the one behind its last.
        held: the chunk's weights and states as bytes, whole lines of them.
        numbers: of the lines, counted in the chunk.
    """
    lines = [data.view(-1, LINE_BYTES).numpy() for data in held]
    piece, kind, first, own = -1, 0, 0, numbers[:0]
    for each in saved:
        if each.kind == "scalars":
            yield each
            continue
        if each.kind == "weights":
            piece, kind = piece + 1, 0
            first, stop = bounds[piece]
            own = numbers[np.searchsorted(numbers, first) : np.searchsorted(numbers, stop)]
        if len(own):
            yield Lines(each, own - first, lines[kind][own])
        kind += 1
