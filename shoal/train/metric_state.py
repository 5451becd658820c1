"""The state of torchmetrics objects over the training data: kept at every step, so that it outlives its worker.

A metric's state is a few tensors of a fixed size, lists that grow, or both. After each step a worker writes the tensors to
a page of its journal and whatever was appended to the lists to its log (``shoal.comm.journal``): a step costs what it
added, not what has gathered. Whoever takes the worker's place begins with what held at the beginning of its step.

In a checkpoint a worker's metrics are a list of *pieces*: one for each worker whose place this one has taken, to be
merged. A piece maps the path of a metric ("auc", or "auc/inner" within another) to its plain values, tensors and lists.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from shoal.comm.journal import Journal
from shoal.train.evaluate import is_stateful, merge, own_copy

Piece = dict[str, dict[str, dict[str, Any]]]
_PLAIN = (int, float, str, bool, type(None))
_TENSOR = "\0tensor"


class MetricNotes:
    """What one worker keeps of its metrics; ``metrics`` are the ones that it updates, ``fresh`` the job's own."""

    def __init__(self, metrics: dict[str, Any], fresh: Mapping[str, Any], journal: Journal) -> None:
        self._metrics = metrics
        self._fresh = fresh
        self._journal = journal
        self._states = list(_states_of(metrics))
        self._first = {path: _plain(vars(metric)) for path, metric in self._states}
        self._log = 0
        # Of which lists the log has more than counts, from where they end; and from where on each was written last.
        self._cut: set[tuple[str, str]] = set()
        self._starts: dict[tuple[str, str], int] = {}
        # (path, state) -> the list, its length and its last entry when it was last written.
        self._written: dict[tuple[str, str], tuple[list[Any], int, Any]] = {}

    def keep(self, step: int) -> None:
        """Write down what holds at the beginning of ``step``."""
        if not self._states:
            return
        page: list[Any] = []
        added: list[Any] = []
        for path, metric in self._states:
            held, first = vars(metric), self._first[path]
            plain = {k: v for k, v in held.items() if type(v) in _PLAIN and (k not in first or first[k] != v)}
            tensors = {}
            for name in metric._defaults:
                value = getattr(metric, name)
                if isinstance(value, list):
                    start = self._starts[path, name] = self._start(path, name, value)
                    if start < len(value) or not start or (path, name) in self._cut:
                        added.append((path, name, start, [_pack(v) for v in value[start:]]))
                else:
                    tensors[name] = _pack(value)
            page.append((path, plain, tensors))
        self._cut.clear()
        if added:
            self._log = self._journal.write_log(self._log, pickle.dumps(added, protocol=5))
        self._journal.write_page(step, pickle.dumps((self._log, page, ()), protocol=5))

    def _start(self, path: str, name: str, value: list[Any]) -> int:
        """From which entry on a list has to be written: behind what is there, or from its beginning where that has changed."""
        known, length, last = self._written.get((path, name), (None, 0, None))
        same = known is value and len(value) >= length and (not length or value[length - 1] is last)
        self._written[path, name] = (value, len(value), value[-1] if value else None)
        return length if same else 0

    def begin_again(self, step: int) -> None:
        """Forget an epoch: from ``step`` on the metrics begin anew."""
        for metric in self._metrics.values():
            metric.reset()
        self._log = 0
        self._written.clear()
        self._cut.clear()
        if self._states:
            # Before anything is written over the epoch's log.
            write_pieces(self._journal, step, ())

    def go_back(self, step: int) -> None:
        """Forget what was taken in since the beginning of ``step``."""
        for metric in self._metrics.values():
            metric.reset()
        self._written.clear()
        self.recall(step)

    def leave_out(self, step: int) -> None:
        """What was taken in since the beginning of ``step`` does not count; the next step begins without it."""
        if not self._states:
            return
        log, whole = self._log, _read(self._journal, step)[2]
        self.go_back(step)
        # What is kept of the next step stays whole until it is kept anew: the log goes on behind it.
        self._log = log
        lists = [(path, name, getattr(metric, name)) for path, metric in self._states for name in metric._defaults]
        for path, name, value in lists if whole else ():
            # One that was written anew from its beginning is not there any more.
            if isinstance(value, list) and self._starts.get((path, name), 0) >= len(value):
                self._written[path, name] = (value, len(value), value[-1] if value else None)
                self._cut.add((path, name))
        self.keep(step + 1)

    def recall(self, step: int) -> None:
        """Take up what held at the beginning of ``step``, where something was kept."""
        if not self._states:
            return
        # What is written from now on goes behind what this step may need once more.
        self._log, pieces, _ = _read(self._journal, step)
        for number, piece in enumerate(pieces):
            for name in self._metrics:
                own = own_copy(self._fresh[name])
                for path, part in _states_of({name: own}):
                    _take_up(part, piece.get(path, {}))
                if own.update_called:
                    self._metrics[name] = merge(self._metrics[name], own) if number else own
        self._states = list(_states_of(self._metrics))


def read_pieces(journal: Journal, step: int) -> list[Piece]:
    """The pieces that a worker's metrics are made of at the beginning of ``step``; none where nothing was kept."""
    return _read(journal, step)[1]


def _read(journal: Journal, step: int) -> tuple[int, list[Piece], bool]:
    """How long the log was, the pieces, and whether the log has all of their lists."""
    data = journal.read_page(step)
    if data is None:
        return 0, [], True
    length, page, more = pickle.loads(data)
    lists: dict[tuple[str, str], list[Any]] = {}
    log = io.BytesIO(journal.read_log(length))
    while log.tell() < length:
        for path, name, start, values in pickle.load(log):
            lists.setdefault((path, name), [])[start:] = [_unpack(v) for v in values]
    piece: Piece = {
        path: {
            "plain": plain,
            "tensors": {name: _unpack(value) for name, value in tensors.items()},
            "lists": {name: _join(values) for (of, name), values in lists.items() if of == path},
        }
        for path, plain, tensors in page
    }
    return length, ([piece] if piece else []) + list(more), not more


def write_pieces(journal: Journal, step: int, pieces: Sequence[Piece]) -> None:
    """Let a worker that begins at ``step`` find these."""
    journal.write_page(step, pickle.dumps((0, [], list(pieces)), protocol=5))


def pieces_of(metrics: Mapping[str, Any]) -> list[Piece]:
    """What metrics hold, as pieces."""
    piece: Piece = {}
    for path, metric in _states_of(metrics):
        state = {name: getattr(metric, name) for name in metric._defaults}
        piece[path] = {
            "plain": _plain(vars(metric)),
            "tensors": {name: value for name, value in state.items() if not isinstance(value, list)},
            "lists": {name: _join(value) for name, value in state.items() if isinstance(value, list)},
        }
    return [piece] if piece else []


def metrics_of(pieces: Sequence[Piece], fresh: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics that hold what pieces say; ``fresh``: the job's own, by name."""
    found = {name: own_copy(metric) for name, metric in fresh.items() if is_stateful(metric)}
    for piece in pieces:
        for path, part in _states_of(found):
            _take_up(part, piece.get(path, {}))
    return found


def deal_pieces(saved: Sequence[Sequence[Piece]], world_size: int) -> list[list[Piece]]:
    """Hand what some number of workers had kept to another number of them."""
    return [[piece for own in saved[rank::world_size] for piece in own] for rank in range(world_size)]


def _states_of(metrics: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every torchmetrics object with a state of its own, those within others included, by path."""
    for name, metric in metrics.items():
        for inner, part in metric.named_modules() if isinstance(metric, torch.nn.Module) else ():
            if hasattr(part, "_defaults"):
                yield (f"{name}/{inner}" if inner else name), part


def _plain(held: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in held.items() if type(v) in _PLAIN}


def _take_up(metric: Any, kept: Mapping[str, Mapping[str, Any]]) -> None:
    # A Metric's own __setattr__ refuses some names.
    held = vars(metric)
    held.update(kept.get("plain", {}))
    held.update({name: value.clone() for name, value in kept.get("tensors", {}).items()})
    held.update({name: _split(joined) for name, joined in kept.get("lists", {}).items()})


def _join(values: list[Any]) -> dict[str, Any]:
    """Many small tensors as one with their shapes, which a file takes more easily; other values as they are."""
    if not values or not all(isinstance(v, torch.Tensor) for v in values) or len({v.dtype for v in values}) > 1:
        return {"values": values}
    return {"joined": torch.cat([v.reshape(-1) for v in values]), "shapes": [tuple(v.shape) for v in values]}


def _split(joined: Mapping[str, Any]) -> list[Any]:
    if "values" in joined:
        return list(joined["values"])
    shapes = joined["shapes"]
    parts = joined["joined"].split([math.prod(shape) for shape in shapes])
    return [part.reshape(shape) for part, shape in zip(parts, shapes, strict=True)]


def _pack(value: Any) -> Any:
    """A tensor as its bytes, which are quick to pickle and no more than what is seen of its storage."""
    if not isinstance(value, torch.Tensor):
        return value
    # NumPy has no bfloat16.
    kind = "bfloat16" if value.dtype == torch.bfloat16 else ""
    array = (value.view(torch.int16) if kind else value).numpy(force=True)
    return _TENSOR, kind or array.dtype.str, array.shape, array.tobytes()


def _unpack(value: Any) -> Any:
    if not (isinstance(value, tuple) and value and isinstance(value[0], str) and value[0] == _TENSOR):
        return value
    _, kind, shape, data = value
    array = np.frombuffer(data, "<i2" if kind == "bfloat16" else kind).reshape(shape)
    tensor = torch.from_numpy(array.copy())
    return tensor.view(torch.bfloat16) if kind == "bfloat16" else tensor
