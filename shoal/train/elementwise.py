"""One chunk of a slice of the weights under an optimizer that works element by element; see ``shoal.train.update``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from shoal.comm.lines import LINE_BYTES, Marks
from shoal.comm.store import Store
from shoal.comm.table import Chunk, Lane, align
from shoal.train.describe import hyperparameters, optimizer_like, sliced_group
from shoal.train.line_step import find as find_line_step
from shoal.train.saved import Lines, Saved, as_bytes, cut_to_lines, lane_kind
from shoal.train.sgd import SgdChunk
from shoal.train.sparse_lines import LEAST_LINES, LineWork, zeros_change_nothing

_LET_GO_BYTES = 64 << 10
_LOOK_EVERY = 8
"""Where a chunk's lines were found to be full, they are looked through again with this update after that."""


class ElementwiseChunk:
    """The pieces of one chunk, their views in the arena, and the optimizer over them."""

    def __init__(
        self, store: Store, lane: Lane, chunk: Chunk, rows: torch.Tensor, optimizer: torch.optim.Optimizer
    ) -> None:
        table = store.table
        self.chunk = chunk
        self.store = store
        self._lane = lane
        replica = lane.replica
        self._keys, self._scalar_keys = table.state_keys, table.scalar_keys
        self.specs = [table.parameters[p.parameter] for p in chunk.pieces]
        self._dtype = self.specs[0].dtype
        width = self._dtype.itemsize
        flat = [
            (spec.offset + piece.start * width, spec.offset + piece.stop * width)
            for piece, spec in zip(chunk.pieces, self.specs, strict=True)
        ]
        self._spans = [(a - chunk.start, b - chunk.start) for a, b in flat]
        weights = store.weight_range(chunk.start, chunk.stop, self._dtype, replica)
        self._weights = [weights[a // width : b // width] for a, b in self._spans]
        self._pieces = [nn.Parameter(own) for own in self._weights]
        # For each kind of state, a tensor for each piece.
        self._states = [
            [store.state_range(k, a, b, self._dtype, replica) for a, b in flat] for k in range(len(self._keys))
        ]
        self._rows = rows.view(len(flat), -1)
        self._made = self._rows[:, :8].cpu().contiguous().numpy().view(np.int64).reshape(-1)
        self._flags = self._rows[:, :8].view(torch.int64).view(-1)
        scalar = table.scalar_dtype
        self._scalars = [
            [row[8 * (1 + k) : 8 * (1 + k) + scalar.itemsize].view(scalar)[0] for k in range(len(self._scalar_keys))]
            for row in self._rows
        ]
        # Whole lines: what is between two parameters is nobody's.
        start, stop = chunk.start, align(chunk.stop)
        self.ranges = [store.weight_range(start, stop, torch.uint8, replica)]
        self.ranges += [store.state_range(k, start, stop, torch.uint8, replica) for k in range(len(self._keys))]
        self.ranges.append(rows)
        self._ends = np.array([align(b) // LINE_BYTES for _, b in self._spans])
        self._indices = np.array([piece.parameter for piece in chunk.pieces])
        self._all = {r: store.gradient_range(r, start, stop, self._dtype) for r in lane.sources}
        self._here = store.arena.device.type == "cpu"
        self._all_marks = {r: store.marks(r, start, stop) for r in lane.sources}
        self.take_sources(lane.sources)
        self._echoes = [
            (k, echo) for k, i in enumerate(self._indices) for echo, e in enumerate(table.echoes) if e.parameter == i
        ]
        self._group_of = [spec.group for spec in self.specs]
        self._optimizer = self._make_optimizer(optimizer)
        self._gradients: list[torch.Tensor | None] = []
        self._bound = [False] * len(self._pieces)
        self._sgd = SgdChunk(weights, self._spans, [self._groups.index(g) for g in self._group_of])
        # How the step in work is made: with the sum's factor where it is made at once.
        self._factor, self.at_once = 1.0, False
        # For how many sums more nobody looks for lines without a gradient; never where a norm is asked for, whose last bit
        # depends on it: a successor does not know the number.
        self._full, self._normed = 0, False
        self._look_at_groups()
        self.reload()

    def _look_at_groups(self) -> None:
        """What follows from the groups: whether lines without a gradient can be left out, and what steps over the others."""
        self._sparse = self._here and zeros_change_nothing(self._optimizer)
        self._line_step = find_line_step(self._optimizer, self._dtype, self._keys) if self._sparse else None
        groups = dict(zip(self._groups, self._optimizer.param_groups, strict=True))
        self._hyperparameters = [groups[of] for of in self._group_of]
        self._steps = self._count_steps()
        self._fits = self._here and not self._echoes and self._sgd.fits(self._optimizer)

    def _count_steps(self) -> np.ndarray:
        """Of each piece how many steps its optimizer has made, to be counted on in place where it keeps count."""
        if self._line_step is None or not self._scalar_keys:
            return np.zeros(len(self._pieces))
        counts = self._rows[:, 8 : 8 + self.store.table.scalar_dtype.itemsize].numpy()
        return counts.view(np.float64 if self.store.table.scalar_dtype == torch.float64 else np.float32)[:, 0]

    def _make_optimizer(self, like: torch.optim.Optimizer) -> torch.optim.Optimizer:
        self._groups = sorted(set(self._group_of))
        return optimizer_like(
            like,
            [
                sliced_group(
                    type(like),
                    like.param_groups[g],
                    [p for p, of in zip(self._pieces, self._group_of, strict=True) if of == g],
                )
                for g in self._groups
            ],
        )

    def take_sources(self, stripes: Sequence[int]) -> None:
        self._sources = tuple(stripes)
        # A slice of all rows makes no copy.
        run = range(stripes[0], stripes[-1] + 1)
        self._rows_of: Any = slice(run.start, run.stop) if len(run) == len(stripes) else list(stripes)
        self._stripes = [self._all[r] for r in stripes]
        found = [own for r in stripes if (own := self._all_marks[r]) is not None]
        self._marks = found if self._here else []
        self._known: tuple[bytes, Marks | None] = b"", None

    def take_groups(self, groups: Sequence[dict[str, Any]]) -> None:
        for own, index in zip(self._optimizer.param_groups, self._groups, strict=True):
            fused = own.get("fused")
            own.update(hyperparameters(groups[index]))
            if "fused" in own:
                own["fused"] = fused
        self._look_at_groups()

    def sum_gradients(self, scratch: torch.Tensor, lines: LineWork, factor: float) -> None:
        touched = self.store.touched[self._rows_of][:, self._indices]
        lines.forget()
        self.at_once = False
        # From the second update on, when the optimizer's state is there.
        worth_trying = self._sparse and factor > 0 and self._ends[-1] >= LEAST_LINES and not self._echoes
        if worth_trying and self._full:
            self._full -= 1
        elif worth_trying and all(self._bound) and touched.all():
            lines.sum_gradients(self._stripes, self._ends, factor, self._known_lines())
            if lines.gradients is not None:
                self._gradients = list(lines.gradients)
                return
            self._full = 0 if self._normed else _LOOK_EVERY - 1
        total = scratch[: self.chunk.stop - self.chunk.start].view(self._dtype)
        width = self._dtype.itemsize
        native = self.store.arena.native
        if self._fits and all(self._bound) and touched.all():
            self.at_once, self._factor, self._total = True, factor, total
            return
        if len(self._stripes) == 1 and factor == 1.0 and not self._echoes:
            # One worker alone: its stripe is the sum already.
            self._gradients = [
                self._stripes[0][a // width : b // width] if touched[0, k] else None
                for k, (a, b) in enumerate(self._spans)
            ]
            return
        if touched.all() and not self._echoes:
            native.sum_into(total, [stripe[: len(total)] for stripe in self._stripes], factor)
            self._gradients = [total[a // width : b // width] for a, b in self._spans]
            return
        self._gradients = []
        for k, (a, b) in enumerate(self._spans):
            sources = [self._stripes[r][a // width : b // width] for r in np.flatnonzero(touched[:, k])]
            sources += (echoes := self._echoes_of(k))
            if not sources:
                self._gradients.append(None)
                continue
            out = total[a // width : b // width]
            native.sum_into(out, sources, factor)
            self._gradients.append(out)
            for echo in echoes:
                # Another stage's memory, read once a step: it need not be resident here while this one computes.
                if echo.nbytes >= _LET_GO_BYTES:
                    self.store.arena.memory.let_go(echo.data_ptr(), echo.nbytes)

    def _known_lines(self) -> Marks | None:
        """What those who computed the gradients know of their lines."""
        if not self._marks:
            return None
        marked = self.store.marked[self._rows_of]
        said = marked.tobytes()
        if said != self._known[0]:
            # It seldom changes from step to step.
            known = np.ascontiguousarray(marked[:, self._indices].all(0), dtype=np.uint8)
            self._known = said, Marks(self._marks, self._ends, known) if known.any() else None
        return self._known[1]

    def _echoes_of(self, k: int) -> list[torch.Tensor]:
        """The gradients that other stages have for the k-th piece."""
        piece = self.chunk.pieces[k]
        return [
            self.store.echo(stripe, echo).view(-1)[piece.start : piece.stop]
            for stripe in self._sources
            for at, echo in self._echoes
            if at == k and self.store.echoed[stripe, echo]
        ]

    def norm_squared(self) -> float:
        self._normed, self._full = True, 0
        gradients = self._gradients
        if self.at_once:
            total, width = self._total, self._dtype.itemsize
            self.store.arena.native.sum_into(total, [stripe[: len(total)] for stripe in self._stripes], self._factor)
            gradients = [total[a // width : b // width] for a, b in self._spans]
        return sum(float(torch.linalg.vector_norm(g, dtype=torch.float64)) ** 2 for g in gradients if g is not None)

    def apply(self, lines: LineWork, scale: float, undo: torch.Tensor | None, saved: int) -> None:
        """Step; ``undo`` and ``saved``: see ``SgdStep``, for what is made at once."""
        if self.at_once:
            self._sgd.step(self._optimizer, self._stripes, self._factor, scale, undo, saved)
            return
        if lines.gradients is None:
            self._step(scale)
            return
        held = self.ranges[:-1]
        if self._line_step is not None:
            self._steps += 1
            lines.step(self._line_step, held, self._hyperparameters, self._steps, scale)
            return
        weights, *states = lines.gather(held, self._dtype)
        self._lend(weights, states)
        self._step(scale)
        lines.scatter(held)
        self._lend(self._weights, self._states)

    def _lend(self, weights: Sequence[torch.Tensor], states: Sequence[Sequence[torch.Tensor]]) -> None:
        """Let the optimizer work on these; of each kind there is one for each piece."""
        for k, piece in enumerate(self._pieces):
            piece.data = weights[k]
            state = self._optimizer.state[piece]
            for key, own in zip(self._keys, states, strict=True):
                state[key] = own[k]

    def _step(self, scale: float) -> None:
        # Apart, because torch's fused SGD takes a list in which all or none have a momentum.
        for begun in (True, False):
            chosen = [
                k for k, gradient in enumerate(self._gradients) if gradient is not None and self._bound[k] == begun
            ]
            if not chosen:
                continue
            for k in chosen:
                gradient = self._gradients[k]
                assert gradient is not None
                # Not in place: what was summed may be the stripe itself, which an update made again would need.
                self._pieces[k].grad = gradient if scale == 1.0 else gradient * scale
            self._optimizer.step()
            for k in chosen:
                self._pieces[k].grad = None
            if not begun:
                for k in chosen:
                    self._keep(k, self._pieces[k])

    def _keep(self, k: int, piece: nn.Parameter) -> None:
        """Move the state that the optimizer has just made into the arena."""
        state = self._optimizer.state.get(piece, {})
        for key, places in zip(self._keys, self._states, strict=True):
            if state.get(key) is not None:
                places[k].copy_(state[key])
                state[key] = places[k]
        for key, place in zip(self._scalar_keys, self._scalars[k], strict=True):
            if key in state:
                place.copy_(state[key])
                state[key] = place
        self._made[k] = self._flags[k] = 1
        self._bound[k] = True

    def reload(self) -> None:
        self._made = self._flags.cpu().numpy()
        for k, piece in enumerate(self._pieces):
            if self._made[k]:
                state = self._optimizer.state[piece]
                state.update(zip(self._keys, (places[k] for places in self._states), strict=True))
                state.update(zip(self._scalar_keys, self._scalars[k], strict=True))
                self._bound[k] = True
            elif self._bound[k]:
                # The chunk went back to before its first update: the optimizer has to make its state anew.
                del self._optimizer.state[piece]
                group = next(g for g in self._optimizer.param_groups if any(p is piece for p in g["params"]))
                fresh = optimizer_like(self._optimizer, [{**hyperparameters(group), "params": [piece]}])
                self._optimizer.state.update(fresh.state)
                self._bound[k] = False

    def changed_lines(self, numbers: np.ndarray) -> Iterator[Saved | Lines]:
        """These lines of the chunk, by weight and by state of each piece."""
        bounds = [(first // LINE_BYTES, int(end)) for (first, _), end in zip(self._spans, self._ends, strict=True)]
        return cut_to_lines(self.saved(), bounds, self.ranges[:-1], numbers)

    def saved(self, touched_only: bool = False) -> Iterator[Saved]:
        width = self._dtype.itemsize
        for k, (piece, spec) in enumerate(zip(self.chunk.pieces, self.specs, strict=True)):
            if touched_only and not self.at_once and self._gradients[k] is None:
                continue
            start = piece.start * width
            if not self._lane.replica:
                yield Saved("weights", spec.name, start, as_bytes(self._weights[k]), spec)
            for key, places in zip(self._keys, self._states, strict=True):
                own = as_bytes(places[k])
                yield Saved(lane_kind(f"state.{key}", self._lane.replica), spec.name, start, own, spec)
            if piece.start == 0 and spec.leads:
                yield Saved(lane_kind("scalars", self._lane.replica), spec.name, 0, self._rows[k])
