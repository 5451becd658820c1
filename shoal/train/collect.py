"""Checkpoints of a run whose parts lie in the memory of many processes: brought together, and dealt out again.

A checkpoint holds whole tensors, whatever the plan was, and rank 0 writes it. So the others hand over their parts piece by
piece, and rank 0 writes each where it belongs: nobody ever holds more than its part and some pieces. The other way about, rank 0
reads one whole tensor after the other and shows it to all, and each keeps its part.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from shoal.comm.group import Group
from shoal.comm.parts import take
from shoal.comm.store import Store, scalar_row_bytes
from shoal.comm.table import FROZEN, ParameterTable, TensorSpec
from shoal.train.checkpoint import PartWriter, ScalarRows
from shoal.train.own import Own
from shoal.train.saved import Saved, as_bytes
from shoal.train.update import Updater

_ON_THE_WAY_BYTES = 64 << 20


class Collector:
    """Brings the parts of all processes together in rank 0's file.

    Args:
        table: the model's own, of whole tensors.
        directory: of checkpoints; rank 0's matters.
    """

    def __init__(
        self, group: Group, store: Store, own: Own, table: ParameterTable, directory: str | Path, updater: Updater
    ) -> None:
        self._group, self._store, self._own, self._updater = group, store, own, updater
        self._table, self._directory = table, directory
        self._batch_bytes = _ON_THE_WAY_BYTES // group.world_size

    def __call__(self, step: int) -> None:
        """Write the state at the beginning of ``step``, which it still is. All processes call it together.

        OSError, on rank 0 and when everybody is through, where the disk does not take it.
        """
        group, store = self._group, self._store
        what = f"the checkpoint of step {step}"
        pages = group.gather_objects(store.read_notebook(group.rank, step), what)
        pieces = list(self._pieces())
        labels = [(saved.kind, saved.name, saved.start_byte, saved.data.numel(), saved.part) for saved in pieces]
        lists: list[list[_Label]] = group.gather_objects(labels, what)
        sizes = [[label[3] for label in labels] for labels in lists]
        # What rank 0 has itself need not travel.
        rounds = list(itertools.zip_longest(*(_batches(own, self._batch_bytes) for own in sizes[1:])))
        writer = PartWriter(store, self._directory, step, self._table)
        trouble: OSError | None = None
        if group.rank == 0:
            for rank, page in enumerate(pages):
                if page is not None:
                    store.write_notebook(rank, step, page)
            trouble = _attempt(lambda: writer.write_rest(*range(group.world_size)))
            trouble = trouble or _attempt(lambda: writer.write(pieces))
        for batches in rounds:
            room = max(sum(own[batch]) for own, batch in zip(sizes[1:], batches, strict=True) if batch is not None)
            batch = batches[group.rank - 1] if group.rank else None
            page = torch.zeros(room, dtype=torch.uint8)
            if batch is not None:
                flat = torch.cat([saved.data.cpu() for saved in pieces[batch]])
                page[: len(flat)] = flat
            for rank, arrived in enumerate(group.bring(page, what)):
                came = batches[rank - 1] if rank else None
                # The others go on, whatever the disk says.
                if came is not None and trouble is None:
                    labels = lists[rank][came]
                    trouble = _attempt(lambda arrived=arrived, labels=labels: writer.write(_unpack(arrived, labels)))  # type: ignore[misc]
        writer.close()
        if trouble is not None:
            raise trouble

    def _pieces(self) -> Iterator[Saved]:
        """What this process has to give: its part of what is trained, and frozen weights that nobody before it has."""
        spoken, store = self._own.spoken, self._store
        for chunk in range(self._updater.count):
            yield from (saved for saved in self._updater.saved(chunk) if saved.name in spoken)
        for index, spec in enumerate(store.table.parameters):
            if spec.group == FROZEN and spec.name in spoken:
                yield Saved("weights", spec.name, 0, as_bytes(store.weights[index]), spec)


def _attempt(action: Callable[[], None]) -> OSError | None:
    try:
        action()
    except OSError as error:
        return error
    return None


def _unpack(page: torch.Tensor, labels: Sequence[_Label]) -> list[Saved]:
    sizes = [label[3] for label in labels]
    return [
        Saved(kind, name, start, data, part)
        for (kind, name, start, _, part), data in zip(labels, page[: sum(sizes)].split(sizes), strict=True)
    ]


_Label = tuple[str, str, int, int, TensorSpec | None]
"""A ``Saved``, with the number of its bytes in their place."""


def _batches(sizes: Sequence[int], most: int) -> Iterator[slice]:
    """Neighbouring pieces that travel together: both sides cut the same list alike."""
    first = held = 0
    for at, size in enumerate(sizes):
        if held and held + size > most:
            yield slice(first, at)
            first, held = at, 0
        held += size
    if held:
        yield slice(first, len(sizes))


Read = Callable[[str, str], torch.Tensor]
"""(what kind of tensor, the parameter's name) -> the whole tensor."""


def deal_out(group: Group, store: Store, table: ParameterTable, read: Read | None, with_state: bool) -> None:
    """Give every process its part of rank 0's weights and, ``with_state``, of its optimizer's state.

    Args:
        table: the model's own, of whole tensors.
        read: rank 0's source, named as in a checkpoint; None for the others.
    """
    places: dict[str, int] = {spec.name: index for index, spec in enumerate(store.table.parameters)}
    rows = ScalarRows(store)

    def show(kind: str, spec: TensorSpec, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        whole = read(kind, spec.name).contiguous() if read is not None else torch.empty(tuple(shape), dtype=dtype)
        flat = as_bytes(whole)
        if flat.numel():
            group.broadcast(flat, 0, "the first weights")
        return whole

    for spec in table.parameters:
        index = places.get(spec.name)
        whole = show("weights", spec, spec.whole_shape, spec.dtype)
        if index is not None:
            store.weights[index].copy_(take(whole, store.table.parameters[index].regions))
        if spec.group == FROZEN or not with_state:
            continue
        row = show("scalars", spec, (scalar_row_bytes(table),), torch.uint8)
        for place in rows.of(index) if index is not None else ():
            place.copy_(row)
        for k, key in enumerate(table.state_keys):
            whole = show(f"state.{key}", spec, spec.whole_shape, spec.dtype)
            if index is not None:
                _fill_state(store, k, store.table.parameters[index], whole)
    for state in table.states if with_state else ():
        spec = table.parameters[state.parameter]
        whole = show(f"state.{state.key}", spec, state.shape, state.dtype)
        for at, own in enumerate(store.table.states):
            part = store.table.parameters[own.parameter]
            if part.name == spec.name and own.key == state.key:
                store.state_tensor(at).copy_(take(whole, part.regions) if state.shape == spec.shape else whole)


def _fill_state(store: Store, key: int, part: TensorSpec, whole: torch.Tensor) -> None:
    """Copy the state of those elements that this process updates; the rest stays untouched, and takes no memory."""
    flat = take(whole, part.regions).reshape(-1)
    width = part.dtype.itemsize
    for start, stop in store.table.ranges or ((part.offset, part.offset + part.nbytes),):
        low, high = max(start, part.offset), min(stop, part.offset + part.nbytes)
        if low < high:
            place = store.state_range(key, low, high, part.dtype)
            place.copy_(flat[(low - part.offset) // width : (high - part.offset) // width])
