"""Updating only those lines of a chunk that got a gradient.

Most rows of an embedding table get none in a step: their gradient is zero, and for some optimizers a zero gradient changes
nothing at all. Then only the lines of 64 bytes that hold anything are summed, copied to the undo log, gathered, updated
and put back, with the bits that updating everything gives wherever the optimizer treats every element alike.

The undo log then holds the numbers of these lines and what they held; the note UNDO_LINES says how many they are, or WHOLE.
Both are complete before CHUNK_SAVED says so, and nothing else is needed to put the lines back. Either way gives the same weights
to the bit, so whoever makes an update again may make it in the other one: a chunk that was full is not looked through each time,
but where gradients are clipped.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from shoal.comm.lines import LINE_BYTES, Marks, load
from shoal.comm.table import align
from shoal.train.line_step import LineStep

WHOLE = -1
# Smaller chunks are updated faster than their lines are looked through.
LEAST_LINES = 1024


def zeros_change_nothing(optimizer: torch.optim.Optimizer) -> bool:
    """Whether an element whose gradient is +0.0 keeps every bit of its weight and its state.

    SGD adds -lr · 0 = -0.0, and Adagrad adds 0² to its sum, which is never -0.0, and -lr · 0 / (√sum + eps) = -0.0 to the
    weight: x + -0.0 is x, for -0.0 too. Weight decay and momentum change what has no gradient, ``maximize`` adds +0.0, and
    without eps there would be 0/0. A subclass may do anything.
    """
    kind = type(optimizer)
    groups = optimizer.param_groups
    if any(group.get("weight_decay") or group.get("maximize") for group in groups):
        return False
    if kind is torch.optim.SGD:
        return not any(group["momentum"] for group in groups)
    return kind is torch.optim.Adagrad and all(group["eps"] > 0 for group in groups)


class LineWork:
    """A worker's room for working on lines, of one chunk at a time.

    ``gradients``: for each piece of the chunk the sums of its lines, one after the other; None where the chunk is to be
    updated as a whole. ``held`` in what follows are the chunk's weights and states as bytes, whole lines of them.
    """

    def __init__(self, longest_bytes: int, held: int) -> None:
        """Make room for chunks of so many bytes at most, with so many tensors to be updated in each."""
        self._lines = load()
        self._most = align(longest_bytes) // LINE_BYTES // 2
        self._numbers = torch.empty(self._most, dtype=torch.int64)
        self._sums = torch.empty(self._most * LINE_BYTES, dtype=torch.uint8)
        self._work = [torch.empty(self._most * LINE_BYTES, dtype=torch.uint8) for _ in range(held)]
        self._own = self._numbers[:0]
        self._cuts: list[tuple[int, int]] = []
        self.gradients: list[torch.Tensor] | None = None

    def sum_gradients(
        self, stripes: Sequence[torch.Tensor], ends: np.ndarray, factor: float, marks: Marks | None = None
    ) -> None:
        """Look for the lines with a gradient and sum these. ``ends``: at which line of the chunk each piece ends."""
        dtype = stripes[0].dtype
        width = LINE_BYTES // dtype.itemsize
        sums = self._sums.view(dtype)
        count = self._lines.sum_into(sums, stripes, factor, self._numbers, int(ends[-1]) // 2, marks)
        self.gradients = None
        if count >= 0:
            self._own = self._numbers[:count]
            cuts = [0, *(np.searchsorted(self._own.numpy(), ends) * width).tolist()]
            self._cuts = list(zip(cuts[:-1], cuts[1:], strict=True))
            self.gradients = [sums[a:b] for a, b in self._cuts]

    @property
    def own(self) -> np.ndarray:
        """The numbers of the lines that are in work."""
        return self._own.numpy()

    @property
    def count(self) -> int:
        """How many lines are in work, or WHOLE."""
        return WHOLE if self.gradients is None else len(self._own)

    def forget(self) -> None:
        """Update the chunk as a whole."""
        self.gradients = None

    def gather(self, held: Sequence[torch.Tensor], dtype: torch.dtype) -> list[list[torch.Tensor]]:
        """Copy the lines out of what is held, to be worked on: for each of these a tensor for each piece."""
        size = len(self._own) * LINE_BYTES
        for work, source in zip(self._work, held, strict=True):
            self._lines.take(work[:size], source, self._own)
        return [[flat[a:b] for a, b in self._cuts] for flat in (work.view(dtype) for work in self._work)]

    def step(
        self, step: LineStep, held: Sequence[torch.Tensor], groups: Sequence[dict[str, Any]], counts: np.ndarray, scale: float
    ) -> None:
        """Update the lines where they lie; of each piece there are its optimizer's group and which step this is."""
        assert self.gradients is not None
        at = 0
        for gradient, group, count in zip(self.gradients, groups, counts, strict=True):
            stop = at + gradient.nbytes // LINE_BYTES
            if stop > at:
                step.run(held, gradient, self._own[at:stop], group, float(count), scale)
            at = stop

    def scatter(self, held: Sequence[torch.Tensor]) -> None:
        """Put the work back."""
        size = len(self._own) * LINE_BYTES
        for work, target in zip(self._work, held, strict=True):
            self._lines.put(target, work[:size], self._own)

    def save(self, undo: torch.Tensor, held: Sequence[torch.Tensor]) -> int:
        """Write what the lines hold to the undo log; return how many bytes that was."""
        size, at = len(self._own) * LINE_BYTES, align(len(self._own) * 8)
        undo[: len(self._own) * 8].view(torch.int64).copy_(self._own)
        for source in held:
            self._lines.take(undo[at : at + size], source, self._own)
            at += size
        return at


def restore_lines(undo: torch.Tensor, count: int, held: Sequence[torch.Tensor]) -> int:
    """Put back the lines that the undo log holds; return how many of its bytes that was."""
    size, at = count * LINE_BYTES, align(count * 8)
    numbers = undo[: count * 8].view(torch.int64)
    for target in held:
        load().put(target, undo[at : at + size], numbers)
        at += size
    return at
