"""Running the user's optimizer on one worker's part of the weights, in chunks that can be undone.

An update must survive the worker that makes it. Each chunk is therefore copied to a small undo log before it is touched:
weights, optimizer state and scalars. A replacement puts the chunk in work back and goes on from there; chunks that
were finished stay finished. Two notes say where a worker is: CHUNK_SAVED (the undo log holds this chunk of this step) and
CHUNK_DONE (chunks before this one are finished). Where only single lines are saved, or blocks just before they are changed,
UNDO_LINES says so: see ``shoal.train.sparse_lines`` and ``shoal.train.sgd``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from shoal.comm.arena import Note
from shoal.comm.store import Store, scalar_row_bytes
from shoal.comm.table import chunks_of_lane, deal_tensors
from shoal.train.describe import hyperparameters
from shoal.train.elementwise import ElementwiseChunk
from shoal.train.saved import Applied, Lines, Saved, as_bytes, lane_kind, restore_ranges, save_ranges
from shoal.train.sgd import PARTLY
from shoal.train.sparse_lines import WHOLE, LineWork, restore_lines


class Updater:
    """What both kinds of optimizer share: the list of chunks and the undo log."""

    def __init__(self, store: Store, rank: int) -> None:
        self.store = store
        self.rank = rank
        self.lane = store.lane(rank)
        self._undo = store.undo_bytes(rank)
        self._native = store.arena.native

    @property
    def count(self) -> int:
        """How many chunks this worker updates in a step."""
        raise NotImplementedError

    @property
    def starts_over(self) -> bool:
        """Whether a replacement makes its predecessor's update again from the first chunk, even where that was done."""
        return False

    def sum_gradients(self, chunk: int, factor: float) -> None:
        """Add up all workers' gradients of a chunk and keep the result for ``norm_squared`` and ``apply``."""
        raise NotImplementedError

    def norm_squared(self) -> float:
        """The squared Euclidean norm of what ``sum_gradients`` kept."""
        raise NotImplementedError

    def apply(self, chunk: int, scale: float) -> None:
        """Let the optimizer update the chunk with the kept gradients times ``scale``."""
        raise NotImplementedError

    def take_sources(self, stripes: Sequence[int]) -> None:
        """Sum these stripes from the next update on, in this order."""
        raise NotImplementedError

    def take_groups(self, groups: Sequence[dict[str, Any]]) -> None:
        """Use these hyperparameters (a scheduler may have changed them) from the next update on."""
        raise NotImplementedError

    def saved(self, chunk: int) -> Iterator[Saved]:
        """What a checkpoint takes from this chunk."""
        raise NotImplementedError

    def changed(self, chunk: int, scale: float) -> Iterator[Saved | Lines | Applied]:
        """What an update has made of this chunk, for the write-ahead log; called while ``sum_gradients`` of it still holds."""
        yield from self.saved(chunk)

    def _ranges(self, chunk: int) -> list[torch.Tensor]:
        """Everything that updating this chunk changes, as bytes."""
        raise NotImplementedError

    def save(self, chunk: int) -> None:
        """Copy the chunk to the undo log."""
        save_ranges(self._undo, self._ranges(chunk))

    def restore(self, chunk: int) -> None:
        """Put the chunk back as the undo log has it."""
        restore_ranges(self._undo, self._ranges(chunk))
        self.reload(chunk)

    def reload(self, chunk: int) -> None:
        """Take up the optimizer state that the arena holds for a chunk."""
        raise NotImplementedError

    def memory(self) -> dict[str, Any] | None:
        """What the optimizer remembers that is no tensor, for the notebook; None: nothing."""
        return None

    def remember(self, memory: dict[str, Any]) -> None:
        """Go back to what the notebook holds."""


class ElementwiseUpdater(Updater):
    """For optimizers that treat every element alike: a worker owns a slice of the flat weights, cut anywhere.

    Each chunk has an optimizer of the user's own type over the pieces of parameters in it, whose state lives in the arena.
    """

    def __init__(self, store: Store, rank: int, optimizer: torch.optim.Optimizer) -> None:
        super().__init__(store, rank)
        table = store.table
        row = scalar_row_bytes(table)
        rows = store.scalar_bytes(rank)
        self.chunks: list[ElementwiseChunk] = []
        first = 0
        for chunk in chunks_of_lane(table, self.lane):
            last = first + len(chunk.pieces)
            self.chunks.append(ElementwiseChunk(store, self.lane, chunk, rows[first * row : last * row], optimizer))
            first = last
        longest = max((c.chunk.stop - c.chunk.start for c in self.chunks), default=0)
        self._scratch = torch.empty(longest, dtype=torch.uint8, device=store.arena.device)
        self._lines = LineWork(longest, 1 + len(table.state_keys))
        self._slot = store.arena.updaters[rank]
        self._current = 0
        # Where a step that is made at once keeps what it changes.
        self._kept: torch.Tensor | None = None

    @property
    def count(self) -> int:
        return len(self.chunks)

    def sum_gradients(self, chunk: int, factor: float) -> None:
        self._current, self._kept = chunk, None
        self.chunks[chunk].sum_gradients(self._scratch, self._lines, factor)

    def norm_squared(self) -> float:
        return self.chunks[self._current].norm_squared()

    def apply(self, chunk: int, scale: float) -> None:
        self.chunks[chunk].apply(self._lines, scale, self._kept, self._slot.address(Note.UNDO_BYTES))

    def take_sources(self, stripes: Sequence[int]) -> None:
        for chunk in self.chunks:
            chunk.take_sources(stripes)

    def take_groups(self, groups: Sequence[dict[str, Any]]) -> None:
        for chunk in self.chunks:
            chunk.take_groups(groups)

    def saved(self, chunk: int) -> Iterator[Saved]:
        return self.chunks[chunk].saved()

    def changed(self, chunk: int, scale: float) -> Iterator[Saved | Lines | Applied]:
        own = self.chunks[chunk]
        if self._lines.gradients is None or any(spec.regions for spec in own.specs):
            return own.saved(touched_only=True)
        return own.changed_lines(self._lines.own)

    def _ranges(self, chunk: int) -> list[torch.Tensor]:
        return self.chunks[chunk].ranges

    def save(self, chunk: int) -> None:
        if self.chunks[chunk].at_once:
            self._kept = self._undo
            self._slot.write(Note.UNDO_BYTES, 0)
            self._slot.write(Note.UNDO_LINES, PARTLY)
            return
        if self._lines.gradients is None:
            super().save(chunk)
        else:
            *held, rows = self._ranges(chunk)
            save_ranges(self._undo[self._lines.save(self._undo, held) :], [rows])
        self._slot.write(Note.UNDO_LINES, self._lines.count)

    def restore(self, chunk: int) -> None:
        count = int(self._slot.note(Note.UNDO_LINES))
        if count == WHOLE:
            super().restore(chunk)
            return
        if count == PARTLY:
            size = int(self._slot.note(Note.UNDO_BYTES))
            self._ranges(chunk)[0][:size].copy_(self._undo[:size])
            self.reload(chunk)
            return
        *held, rows = self._ranges(chunk)
        restore_ranges(self._undo[restore_lines(self._undo, count, held) :], [rows])
        self.reload(chunk)

    def reload(self, chunk: int) -> None:
        self.chunks[chunk].reload()


class WholeUpdater(Updater):
    """For every other optimizer: a worker owns whole tensors and the user's own optimizer steps over them at once.

    Its one chunk is everything that this worker owns. Values that are no tensors (a Python ``step``, a group's counters)
    travel in the notebook: see ``memory`` and ``remember``.
    """

    def __init__(
        self, store: Store, rank: int, optimizer: torch.optim.Optimizer, parameters: Sequence[nn.Parameter]
    ) -> None:
        super().__init__(store, rank)
        local = self.lane.replica is not None
        self._sources: Sequence[int] = self.lane.sources
        self.own = deal_tensors(store.table, 1)[0] if local else deal_tensors(store.table, store.parts)[rank]
        self._optimizer = optimizer
        self._parameters = parameters
        row = scalar_row_bytes(store.table)
        rows = store.scalar_bytes(rank)
        self._made = rows[: row * len(parameters)].view(torch.int64)
        self._row_bytes = rows[: row * len(parameters)]
        own = set(self.own)
        self._states = [(i, s) for i, s in enumerate(store.table.states) if s.parameter in own]
        self._gradients: dict[int, torch.Tensor] = {}
        # What the notebook says of the step's beginning, for an update that has to be made again.
        self._remembered: dict[str, Any] = {}

    @property
    def count(self) -> int:
        return 1 if self.own else 0

    @property
    def starts_over(self) -> bool:
        # What the optimizer keeps in Python numbers died with the worker; only the step's beginning is in the notebook.
        return True

    def sum_gradients(self, chunk: int, factor: float) -> None:
        self._gradients = {}
        for index in self.own:
            stripes = [self.store.gradient(r, index) for r in self._sources if self.store.touched[r, index]]
            stripes += [
                self.store.echo(r, at)
                for r in self._sources
                for at, echo in enumerate(self.store.table.echoes)
                if echo.parameter == index and self.store.echoed[r, at]
            ]
            if stripes:
                out = torch.empty_like(stripes[0])
                self._native.sum_into(out.view(-1), [s.view(-1) for s in stripes], factor)
                self._gradients[index] = out

    def norm_squared(self) -> float:
        return sum(float(torch.linalg.vector_norm(g, dtype=torch.float64)) ** 2 for g in self._gradients.values())

    def apply(self, chunk: int, scale: float) -> None:
        for index, gradient in self._gradients.items():
            self._parameters[index].grad = gradient.mul_(scale) if scale != 1.0 else gradient
        self._optimizer.step()
        for index in self._gradients:
            self._parameters[index].grad = None
            self._made[index] = 1
        for place, spec in self._states:
            state = self._optimizer.state.get(self._parameters[spec.parameter], {})
            value = state.get(spec.key)
            view = self.store.state_tensor(place, self.lane.replica)
            if value is not None and value.data_ptr() != view.data_ptr():
                view.copy_(value)
                state[spec.key] = view
        self._gradients = {}

    def memory(self) -> dict[str, Any]:
        """The part of the optimizer's state that is no tensor, for the notebook."""
        tensors = {(spec.parameter, spec.key) for _, spec in self._states}
        rest = {
            self.store.table.parameters[index].name: {
                key: copy.copy(value)
                for key, value in self._optimizer.state.get(self._parameters[index], {}).items()
                if (index, key) not in tensors
            }
            for index in self.own
        }
        # What belongs to no one parameter is kept under a key of the optimizer's own, as torch's state_dict has it.
        common = {
            key: copy.deepcopy(v) for key, v in self._optimizer.state.items() if not isinstance(key, torch.Tensor)
        }
        groups = [hyperparameters(g) for g in self._optimizer.param_groups]
        return {"state": rest, "common": common if self.own else {}, "groups": groups}

    def remember(self, memory: dict[str, Any]) -> None:
        """Go back to what the notebook holds."""
        self._remembered = memory
        self.reload(0)

    def take_sources(self, stripes: Sequence[int]) -> None:
        self._sources = stripes

    def take_groups(self, groups: Sequence[dict[str, Any]]) -> None:
        """The user's own optimizer is the one that a scheduler changes: nothing to carry over."""

    def reload(self, chunk: int) -> None:
        for group, kept in zip(self._optimizer.param_groups, self._remembered.get("groups", []), strict=False):
            group.update(kept)
        self._optimizer.state.update(copy.deepcopy(self._remembered.get("common", {})))
        for index in self.own:
            parameter = self._parameters[index]
            self._optimizer.state.pop(parameter, None)
            if self._made[index]:
                state = dict(self._remembered.get("state", {}).get(self.store.table.parameters[index].name, {}))
                for place, spec in self._states:
                    if spec.parameter == index:
                        state[spec.key] = self.store.state_tensor(place, self.lane.replica)
                self._optimizer.state[parameter] = state

    def _ranges(self, chunk: int) -> list[torch.Tensor]:
        replica = self.lane.replica
        ranges = [as_bytes(self.store.weight(index, replica)) for index in self.own]
        ranges += [as_bytes(self.store.state_tensor(place, replica)) for place, _ in self._states]
        return [*ranges, self._row_bytes]

    def saved(self, chunk: int) -> Iterator[Saved]:
        for index in self.own:
            spec = self.store.table.parameters[index]
            if not self.lane.replica:
                yield Saved("weights", spec.name, 0, as_bytes(self.store.weight(index, self.lane.replica)), spec)
            if not spec.leads:
                continue
            row = self._row_bytes.view(len(self._parameters), -1)[index]
            yield Saved(lane_kind("scalars", self.lane.replica), spec.name, 0, row)
        for place, state in self._states:
            spec = self.store.table.parameters[state.parameter]
            data = as_bytes(self.store.state_tensor(place, self.lane.replica))
            if state.shape == spec.shape:
                yield Saved(lane_kind(f"state.{state.key}", self.lane.replica), spec.name, 0, data, spec)
            elif spec.leads:
                yield Saved(lane_kind(f"state.{state.key}", self.lane.replica), spec.name, 0, data)


def make_updater(
    store: Store, rank: int, optimizer: torch.optim.Optimizer, parameters: Callable[[], Sequence[nn.Parameter]]
) -> Updater:
    """The updater that fits the job's optimizer."""
    if store.table.elementwise:
        return ElementwiseUpdater(store, rank, optimizer)
    return WholeUpdater(store, rank, optimizer, parameters())
