"""The state of torchmetrics objects over the training data: kept at every step, so that it outlives its worker.

A metric's state is a few tensors of a fixed size, lists that grow, or both. After each step a worker writes the tensors to a page
of its journal and whatever was appended to the lists to its log (``shoal.comm.journal``): a step costs what it added, not
what has gathered. Whoever takes the worker's place begins with what held at the beginning of its step.

In a checkpoint a worker's metrics are a list of *pieces*: one for each worker whose place this one has taken, to be merged. A piece
maps the path of a metric ("auc", or "auc/inner" within another) to its plain values, its tensors and its lists.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from shoal.comm.journal import Journal

Piece = dict[str, dict[str, dict[str, Any]]]
_PLAIN = (int, float, str, bool, type(None))
_TENSOR = "\0tensor"


class MetricNotes:
    """What one worker keeps of its metrics; ``metrics`` are the ones that it updates, ``fresh`` the job's own."""

    def __init__(self, metrics: Mapping[str, Any], fresh: Mapping[str, Any], journal: Journal) -> None:
        self._metrics = metrics
        self._fresh = fresh
        self._journal = journal
        self._states = list(_states_of(metrics))
        self._first = {path: _plain(vars(metric)) for path, metric in self._states}
        self._log = 0
        # (path, state) -> the list, its length and its last entry when it was last written.
        self._written: dict[tuple[str, str], tuple[list[Any], int, Any]] = {}

    def keep(self, step: int) -> None:
        """Write down what holds at the beginning of ``step``."""
        if not self._states:
            return
        page, added = [], []
        for path, metric in self._states:
            held, first = vars(metric), self._first[path]
            plain = {k: v for k, v in held.items() if type(v) in _PLAIN and (k not in first or first[k] != v)}
            tensors, joined = {}, []
            for name in metric._defaults:
                value = held[name]
                if isinstance(value, list):
                    joined.append((name, getattr(metric._reductions[name], "__name__", "") == "dim_zero_cat"))
                    start = self._start(path, name, value)
                    if start < len(value) or not start:
                        added.append((path, name, start, [_pack(v) for v in value[start:]]))
                else:
                    tensors[name] = _pack(value)
            page.append((path, plain, tensors, joined))
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
        self.keep(step)

    def recall(self, step: int) -> None:
        """Take up what held at the beginning of ``step``, where something was kept."""
        for number, piece in enumerate(read_pieces(self._journal, step) if self._states else []):
            for name, metric in self._metrics.items():
                own = metric if not number else copy.deepcopy(self._fresh[name])
                for path, part in _states_of({name: own}):
                    _take_up(part, piece.get(path, {}))
                if number and own.update_called:
                    merge_into(metric, own)


def merge_into(left: Any, right: Any) -> None:
    """Add the state of a torchmetrics object to another that may have none yet."""
    if left.update_called:
        count = left._update_count + right._update_count
        left.merge_state(right)
        left._update_count = count
        return
    for (_, mine), (_, other) in zip(_states_of({"": left}), _states_of({"": right}), strict=True):
        vars(mine).update({name: vars(other)[name] for name in mine._defaults})
        vars(mine).update(_plain(vars(other)))


def read_pieces(journal: Journal, step: int) -> list[Piece]:
    """The pieces that a worker's metrics are made of at the beginning of ``step``; none where nothing was kept."""
    data = journal.read_page(step)
    if data is None:
        return []
    length, page, more = pickle.loads(data)
    piece: Piece = {
        path: {
            "plain": plain,
            "tensors": {name: _unpack(value) for name, value in tensors.items()},
            "lists": {name: [] for name, _ in lists},
        }
        for path, plain, tensors, lists in page
    }
    log = io.BytesIO(journal.read_log(length))
    while log.tell() < length:
        for path, name, start, values in pickle.load(log):
            piece[path]["lists"][name][start:] = [_unpack(v) for v in values]
    for path, _, _, lists in page:
        for name, joined in lists:
            if joined:
                piece[path]["lists"][name] = _join(piece[path]["lists"][name])
    return ([piece] if piece else []) + list(more)


def write_pieces(journal: Journal, step: int, pieces: Sequence[Piece]) -> None:
    """Let a worker that begins at ``step`` find these."""
    journal.write_page(step, pickle.dumps((0, [], list(pieces)), protocol=5))


def deal_pieces(saved: Sequence[Sequence[Piece]], world_size: int) -> list[list[Piece]]:
    """Hand what some number of workers had kept to another number of them."""
    return [[piece for own in saved[rank::world_size] for piece in own] for rank in range(world_size)]


def _states_of(metrics: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every torchmetrics object with a state of its own, those within others included, by path."""
    for name, metric in metrics.items():
        for inner, part in metric.named_modules() if isinstance(metric, torch.nn.Module) else ():
            if hasattr(part, "_defaults") and hasattr(part, "_reductions"):
                yield (f"{name}/{inner}" if inner else name), part


def _plain(held: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in held.items() if type(v) in _PLAIN}


def _take_up(metric: Any, kept: Mapping[str, Mapping[str, Any]]) -> None:
    # A Metric's own __setattr__ refuses some names.
    vars(metric).update(kept.get("plain", {}))
    for name, value in {**kept.get("tensors", {}), **kept.get("lists", {})}.items():
        vars(metric)[name] = list(value) if isinstance(value, list) else value.clone()


def _join(values: list[Any]) -> list[Any]:
    """Many small tensors as one, as the metric itself would join them."""
    alike = all(isinstance(v, torch.Tensor) for v in values) and len({v.dtype for v in values}) == 1
    return [torch.cat([v.reshape(1) if not v.dim() else v for v in values])] if alike and len(values) > 1 else values


def _pack(value: Any) -> Any:
    """A tensor as numpy has it, which is quick to pickle and takes no more than what is seen of its storage."""
    if not isinstance(value, torch.Tensor):
        return value
    value = value.detach().cpu()
    if value.dtype == torch.bfloat16:
        return _TENSOR, True, value.view(torch.int16).numpy()
    return _TENSOR, False, value.numpy()


def _unpack(value: Any) -> Any:
    if not (isinstance(value, tuple) and len(value) == 3 and value[0] is not None and value[0] == _TENSOR):
        return value
    tensor = torch.from_numpy(value[2].copy())
    return tensor.view(torch.bfloat16) if value[1] else tensor
