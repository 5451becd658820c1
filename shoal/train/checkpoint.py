"""Checkpoints: everything a run needs to go on, written while it goes on.

A checkpoint is a directory ``checkpoints/step-00000123``: ``state.safetensors`` (weights, optimizer state, buffers),
``rank-0.pt`` and so on (schedules and running means), ``meta.json`` (the step, and the SHA-256 of the other files). It is
written under another name, synced, and moved into place in one rename; older ones are deleted after that.

While training goes on, the state to be saved is that of a step's beginning, and it is the step's own update that would
overwrite it. So each worker writes a chunk to the file just before it updates it (a copy into the page cache), and the
supervisor syncs and checks the file in the background once all have done so.

The file is the same whatever the plan was: whole tensors under the model's own names.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shoal import tensorfile
from shoal.comm.journal import Journal
from shoal.comm.parts import Region, runs, take
from shoal.comm.store import Columns, Store, scalar_row_bytes
from shoal.comm.table import FROZEN, ParameterTable, chunks_of_lane, deal_tensors
from shoal.errors import RequestError
from shoal.tensorfile import Entry, dtype_name, sync
from shoal.train import notes
from shoal.train.metric_state import Piece, read_pieces
from shoal.train.row_tables import SavedRows
from shoal.train.saved import Saved, as_bytes, lane_kind

KEPT = 2
EVERY_S = 20.0


def cadence() -> float:
    """Seconds between checkpoints: ``SHOAL_CHECKPOINT_S`` in the environment, or 20."""
    text = os.environ.get("SHOAL_CHECKPOINT_S")
    if text is None:
        return EVERY_S
    with contextlib.suppress(ValueError):
        if float(text) >= 0:
            return float(text)
    raise RequestError(f'SHOAL_CHECKPOINT_S is "{text}"; give the seconds between checkpoints, 0 or more.')


class FileLayout:
    """Where each tensor of a checkpoint lies in its safetensors file; ``lanes``: copies of the optimizer's state."""

    def __init__(self, table: ParameterTable, lanes: int = 1) -> None:
        self.entries: dict[str, Entry] = {}
        self._at = 0
        row = scalar_row_bytes(table)
        for spec in table.parameters:
            self._add("weights", spec.name, spec.dtype, spec.whole_shape)
            for lane in range(lanes) if spec.group != FROZEN else ():
                for key in table.state_keys:
                    self._add(lane_kind(f"state.{key}", lane), spec.name, spec.dtype, spec.whole_shape)
                self._add(lane_kind("scalars", lane), spec.name, torch.uint8, (row,))
        for state in table.states:
            spec = table.parameters[state.parameter]
            shape = spec.whole_shape if state.shape == spec.shape else state.shape
            for lane in range(lanes):
                self._add(lane_kind(f"state.{state.key}", lane), spec.name, state.dtype, shape)
        for spec in table.buffers:
            self._add("buffers", spec.name, spec.dtype, spec.shape)

    def _add(self, kind: str, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
        if f"{kind}/{name}" in self.entries:
            return
        nbytes = math.prod(shape) * dtype.itemsize
        self.entries[f"{kind}/{name}"] = Entry(dtype_name(dtype), shape, self._at, self._at + nbytes)
        self._at += nbytes

    @cached_property
    def header(self) -> bytes:
        """The safetensors header, with its length before it."""
        return tensorfile.header(self.entries)

    @property
    def size(self) -> int:
        return len(self.header) + self._at

    def places(self, saved: Saved) -> Iterator[tuple[slice, int]]:
        """Where a saved piece goes: slices of its bytes, each with its offset in bytes from the beginning of the file."""
        first = len(self.header) + self.entries[f"{saved.kind}/{saved.name}"].start
        size = saved.data.numel()
        if saved.part is None or not saved.part.regions:
            yield slice(0, size), first + saved.start_byte
            return
        spec, width, start = saved.part, saved.part.dtype.itemsize, saved.start_byte
        begin = start // width
        for low, at, count in runs(spec.whole_shape, spec.regions, begin, begin + size // width):
            yield slice((low - begin) * width, (low - begin + count) * width), first + at * width


def part_path(directory: str | Path, step: int) -> Path:
    """Where a checkpoint is written before it is complete."""
    return Path(directory) / f".part-{step:08d}"


class PartWriter:
    """Writes parts of one checkpoint; several processes may each write theirs at the same time.

    ``table``: the model's, where the store has only some of its parts. ``marks``: for each place under which number its notes
    are kept, where that is not the step.
    """

    def __init__(
        self, store: Store, directory: str | Path, step: int, table: ParameterTable | None = None,
        marks: Mapping[int, int] | None = None,
    ) -> None:  # fmt: skip
        self._store = store
        self.step = step
        self._marks = marks or {}
        self._layout = FileLayout(table or store.table, store.lanes)
        self._path = part_path(directory, step)
        self._fd = -1

    def write(self, parts: Iterable[Saved | SavedRows]) -> None:
        """Write pieces; OSError where the disk does not take them."""
        if self._fd < 0:
            self._fd = self._open()
        for saved in parts:
            if isinstance(saved, SavedRows):
                saved.write(self._path)
                continue
            data = saved.data.cpu().numpy()
            for part, offset in self._layout.places(saved):
                self._write_at(data[part], offset)

    def _open(self) -> int:
        self._path.mkdir(parents=True, exist_ok=True)
        return os.open(self._path / "state.safetensors", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)

    def write_rest(self, *ranks: int) -> None:
        """Write what is no chunk: these ranks' notes, and for rank 0 the header, frozen weights and buffers.

        Servers are counted behind the workers.
        """
        self.write(())
        step, store = self.step, self._store
        if 0 in ranks:
            self._write_at(np.frombuffer(self._layout.header, dtype=np.uint8), 0)
            self.write(
                Saved("weights", spec.name, 0, as_bytes(store.weights[index]), spec)
                for index, spec in enumerate(store.table.parameters)
                if spec.group == FROZEN
            )
            self.write(
                Saved("buffers", spec.name, 0, as_bytes(store.buffer(step % 2, index)))
                for index, spec in enumerate(store.table.buffers)
            )
        for rank in ranks:
            self._write_notes(rank)

    def _write_notes(self, rank: int) -> None:
        mark = self._marks.get(rank, self.step)
        sums: list[float] = []
        metrics: list[Piece] = []
        if rank < self._store.arena.world_size:
            record = self._store.record(rank, self.step - 1)
            if int(record[Columns.STEP]) != self.step:
                # It was too late for that step (``backup``).
                record = np.zeros(Columns.COUNT)
            sums = record[Columns.LOSS_SUM : Columns.SAMPLES_SUM + 1].tolist() + record[Columns.VALUE_SUMS :].tolist()
            metrics = read_pieces(Journal(self._store.arena, rank), mark)
        # Into memory first: torch tells a full disk by a RuntimeError.
        kept = {"notebook": self._store.read_notebook(rank, mark), "sums": sums, "metrics": metrics}
        self._write_page(rank, notes.to_bytes(kept))

    def _write_page(self, rank: int, page: memoryview) -> None:
        (self._path / f"rank-{rank}.pt").write_bytes(page)

    def write_all(self) -> None:
        """Write everything, while no worker is at work."""
        store, table = self._store, self._store.table
        for rank in range(store.arena.layout.places):
            self.write_rest(rank)
        rows = ScalarRows(store)
        for index, spec in enumerate(table.trained):
            self.write([Saved("weights", spec.name, 0, as_bytes(store.weights[index]), spec)])
            for lane in range(store.lanes):
                if spec.leads:
                    self.write([Saved(lane_kind("scalars", lane), spec.name, 0, rows.of(index, lane)[0])])
                for k, key in enumerate(table.state_keys):
                    data = store.state_range(k, spec.offset, spec.offset + spec.nbytes, spec.dtype, lane)
                    self.write([Saved(lane_kind(f"state.{key}", lane), spec.name, 0, as_bytes(data), spec)])
        for place, state in enumerate(table.states):
            spec = table.parameters[state.parameter]
            part = spec if state.shape == spec.shape else None
            for lane in range(store.lanes) if part is not None or spec.leads else ():
                data = as_bytes(store.state_tensor(place, lane))
                self.write([Saved(lane_kind(f"state.{state.key}", lane), spec.name, 0, data, part)])
        self.close()

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _write_at(self, data: np.ndarray, offset: int) -> None:
        view = data.data.cast("B")
        while len(view):
            written = os.pwrite(self._fd, view[: 1 << 30], offset)
            view, offset = view[written:], offset + written


class ScalarRows:
    """Where the rows of a parameter's scalars lie: one for each piece of it, for each part of the arena."""

    def __init__(self, store: Store) -> None:
        table, parts = store.table, store.parts
        self._rows: dict[tuple[int, int], list[torch.Tensor]] = {}
        row = scalar_row_bytes(table)
        hands = deal_tensors(table, parts) if not store.local else deal_tensors(table, 1) * parts
        for part in range(parts):
            lane = store.lane(part)
            data = store.scalar_bytes(part)
            if table.elementwise:
                chunks = chunks_of_lane(table, lane)
                owned = enumerate(piece.parameter for chunk in chunks for piece in chunk.pieces)
            else:
                owned = ((index, index) for index in hands[part])  # type: ignore[assignment]
            for at, parameter in owned:
                rows = self._rows.setdefault((parameter, lane.replica or 0), [])
                rows.append(data[at * row : (at + 1) * row])

    def of(self, parameter: int, lane: int = 0) -> list[torch.Tensor]:
        """The rows of a trained parameter in one copy of the optimizer's state, the first piece's first."""
        return self._rows.get((parameter, lane), [])


# -- completing and reading ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    path: Path
    step: int
    meta: Mapping[str, Any]

    @property
    def state(self) -> Path:
        """The file with its tensors."""
        return self.path / "state.safetensors"


def complete(directory: Path, step: int, meta: Mapping[str, Any], keep: int = KEPT) -> Checkpoint:
    """Sync a written part, add ``meta.json`` with checksums, and move it into place; delete older ones. OSError if it fails."""
    part = part_path(directory, step)
    sums = {}
    for path in sorted(part.iterdir()):
        if path.name != "meta.json":
            sums[path.name] = _sha256(path)
            sync(path)
    meta = {**meta, "step": step, "sha256": sums, "written": time.time()}
    meta["check"] = _meta_check(meta)
    (part / "meta.json").write_text(json.dumps(meta, indent=1))
    sync(part / "meta.json")
    sync(part)
    final = directory / f"step-{step:08d}"
    if final.exists():
        shutil.rmtree(final)
    part.rename(final)
    sync(directory)
    prune(directory, keep)
    return Checkpoint(final, step, meta)


def prune(directory: Path, keep: int) -> None:
    """Delete all checkpoints but the newest ``keep``."""
    for old in sorted(directory.glob("step-*"))[:-keep]:
        shutil.rmtree(old, ignore_errors=True)


def discard_parts(directory: Path) -> None:
    """Delete what was left of checkpoints that never became complete."""
    for part in directory.glob(".part-*"):
        shutil.rmtree(part, ignore_errors=True)


def newest(
    directory: Path, damaged: list[tuple[Path, str]] | None = None, unused: Callable[[Checkpoint], bool] = lambda found: False
) -> Checkpoint | None:
    """The newest checkpoint that is whole.

    Args:
        damaged: those that are not are added to it, with the reason.
        unused: whether nothing will be read of a checkpoint's ``state``, which then may be as it is. It may be damaged.
    """
    for path in sorted(directory.glob("step-*"), reverse=True):
        found, reason = None, ""
        try:
            found = described(path)
            reason = damage(found, [name for name in found.meta["sha256"] if name != found.state.name])
        except (OSError, ValueError, KeyError, TypeError) as error:
            reason = str(error)
        if found is not None and not reason:
            try:
                reason = "" if unused(found) else damage(found, [found.state.name])
            except Exception:
                # A damaged file may be read as anything.
                if not (reason := damage(found, [found.state.name])):
                    raise
            if not reason:
                return found
        if damaged is not None:
            damaged.append((path, reason))
    return None


def described(path: Path) -> Checkpoint:
    """What ``meta.json`` says of a checkpoint. OSError, ValueError, KeyError, TypeError: it is damaged."""
    meta = json.loads((path / "meta.json").read_text())
    if meta["check"] != _meta_check(meta):
        raise ValueError("meta.json is not what was written")
    return Checkpoint(path, int(meta["step"]), meta)


def damage(found: Checkpoint, names: Sequence[str]) -> str:
    """What is wrong with some of a checkpoint's files, which are read two at a time; empty where they are whole."""

    def look(name: str) -> str:
        try:
            return "" if _sha256(found.path / name) == found.meta["sha256"][name] else f"{name} is not what was written"
        except OSError as error:
            return str(error)

    with ThreadPoolExecutor(2, "shoal-checkpoint") as threads:
        return next(filter(None, threads.map(look, names)), "")


@dataclass(frozen=True)
class Restored:
    """What a checkpoint holds beside tensors: the schedule's page, optimizer values by parameter, the epoch's sums.

    ``metrics`` is what each worker that wrote it had gathered in metrics with a state.
    """

    notebook: dict[str, Any] | None
    sums: np.ndarray
    metrics: list[list[Piece]]


def restore(checkpoint: Checkpoint, store: Store, tensors: Any = None) -> Restored:
    """Fill the arena from a checkpoint, whatever number of workers wrote it. RequestError where it is of another model.

    ``tensors``: what to read instead of the checkpoint's own, as ``open_tensors`` gives it.
    """
    check(checkpoint, store.table)
    if tensors is None:
        restore_tensors(store, checkpoint.state)
    else:
        _restore_tensors(store, tensors, _lanes_in(tensors.keys()))
    return restore_notes(checkpoint)


def restore_tensors(store: Store, path: Path) -> None:
    """Fill the arena's tensors from what a ``PartWriter`` wrote for the same model, under any plan."""
    with _open(path) as file:
        _restore_tensors(store, file, _lanes_in(file.keys()))


def open_tensors(checkpoint: Checkpoint) -> Any:
    """The tensors of a checkpoint, as safetensors opens them: mapped, and read when they are asked for."""
    return _open(checkpoint.state)


def _open(path: Path) -> Any:
    from safetensors import safe_open

    return safe_open(path, framework="pt")


def read_state(checkpoint: Checkpoint, table: ParameterTable) -> dict[str, torch.Tensor]:
    """The model's state_dict in a checkpoint, under every name and in the model's own order; mapped, not read."""
    with open_tensors(checkpoint) as file:
        found = {n: file.get_tensor(f"weights/{s.name}") for s in table.parameters for n in s.names}
        found |= {n: file.get_tensor(f"buffers/{s.name}") for s in table.buffers if s.persistent for n in s.names}
    return {name: found[name] for name in table.model_keys if name in found}


def check(checkpoint: Checkpoint, table: ParameterTable) -> None:
    """RequestError where a checkpoint is of another model or optimizer than a table."""
    with open_tensors(checkpoint) as file:
        names = set(file.keys())
        layout = layout_of(file, table)
        if names != set(layout.entries):
            odd = sorted(names ^ set(layout.entries))[0]
            raise RequestError(
                f"The checkpoint {checkpoint.path} is of another model or optimizer ({odd} is not in both); "
                "resume with the job that wrote it, or choose another --run."
            )
        for key, entry in layout.entries.items():
            value = file.get_tensor(key)
            if tuple(value.shape) != entry.shape:
                raise RequestError(
                    f"The checkpoint {checkpoint.path} has {key.partition('/')[2]} in the shape {tuple(value.shape)}, the "
                    f"job in {entry.shape}; resume with the job that wrote it, or choose another --run."
                )


def layout_of(file: Any, table: ParameterTable) -> FileLayout:
    """How a checkpoint's file of this table is laid out, with as many lanes as one has."""
    return FileLayout(table, _lanes_in(file.keys()))


def _lanes_in(names: Iterable[str]) -> int:
    """How many copies of the optimizer's state a checkpoint holds."""
    return 1 + max((int(kind.partition("@")[2] or 0) for kind in (n.partition("/")[0] for n in names)), default=0)


def _restore_tensors(store: Store, file: Any, lanes: int) -> None:
    """Copy weights, buffers and state into the arena; a lane that the checkpoint lacks gets another one's state."""
    table = store.table
    rows = ScalarRows(store)

    def read(target: torch.Tensor, key: str, regions: Sequence[Region] = ()) -> None:
        _read_tensor(store, target, file, key, regions)

    for index, spec in enumerate(table.parameters):
        read(store.weights[index], f"weights/{spec.name}", spec.regions)
    for index, spec in enumerate(table.buffers):
        for parity in (0, 1):
            read(store.buffer(parity, index), f"buffers/{spec.name}")
    for lane in range(store.lanes):
        kept = lane % lanes
        for index, spec in enumerate(table.trained):
            for row in rows.of(index, lane):
                read(row, f"{lane_kind('scalars', kept)}/{spec.name}")
            for k, state_key in enumerate(table.state_keys):
                place = store.state_range(k, spec.offset, spec.offset + spec.nbytes, spec.dtype, lane)
                read(place, f"{lane_kind(f'state.{state_key}', kept)}/{spec.name}", spec.regions)
        for at, state in enumerate(table.states):
            spec = table.parameters[state.parameter]
            regions = spec.regions if state.shape == spec.shape else ()
            read(store.state_tensor(at, lane), f"{lane_kind(f'state.{state.key}', kept)}/{spec.name}", regions)


def _read_tensor(store: Store, target: torch.Tensor, file: Any, key: str, regions: Sequence[Region]) -> None:
    """Copy a tensor of a file, or a part of it, to its place in the arena."""
    memory = store.arena.memory
    if not regions and hasattr(file, "fill") and memory.holds(target):
        file.fill(key, target, memory)
    else:
        source = take(file.get_tensor(key), regions)
        memory.copy(target, source.reshape(target.shape))


def restore_notes(checkpoint: Checkpoint) -> Restored:
    """What a checkpoint holds beside tensors."""
    paths = sorted(checkpoint.path.glob("rank-*.pt"), key=lambda p: int(p.stem.split("-")[1]))
    return bring_together(notes.read(path) for path in paths)


def bring_together(pages: Iterable[Mapping[str, Any]]) -> Restored:
    """What the notes of all places, in their order, come to."""
    notebook: dict[str, Any] | None = None
    sums: Any = 0.0
    metrics: list[list[Piece]] = []
    for kept in pages:
        # A server has computed nothing and keeps no metrics.
        if kept["sums"]:
            sums = sums + np.array(kept["sums"])
            metrics.append(kept.get("metrics", []))
        page = kept["notebook"]
        if notebook is None:
            notebook = page
        elif page is not None and page.get("optimizer"):
            notebook["optimizer"]["state"].update(page["optimizer"]["state"])
            notebook["optimizer"]["common"].update(page["optimizer"]["common"])
    return Restored(notebook, sums, metrics)


def _meta_check(meta: Mapping[str, Any]) -> str:
    """The SHA-256 of all that meta.json says but for this."""
    rest = {key: value for key, value in meta.items() if key != "check"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        if hasattr(hashlib, "file_digest"):
            return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
        return digest.hexdigest()
