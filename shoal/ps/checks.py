"""Whether what a server is given fits what it holds. Everything is looked at before anything changes.

Whoever has a run's keys may have another version, or a bug: what is of a wrong shape, dtype, size or name is refused in a
sentence, and the server is as it was.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from shoal.errors import RequestError
from shoal.ps.applied import PushId
from shoal.ps.dense import DensePart, Form, Numbers, is_number
from shoal.ps.spec import TableSpec
from shoal.ps.table import Table, sketch_shape

if TYPE_CHECKING:
    from shoal.ps.shard import Kept, Snapshot

MOST = 1 << 62
"""Counts are below this, so that one more is a number that can be sent, too."""

_LARGEST = 3e38
"""What float32 holds."""
_ROWS = {"keys": torch.int64, "counts": torch.int64, "last": torch.int64}


def check_count(what: str, count: int) -> None:
    """RequestError where something is no count."""
    if not 0 <= count < MOST:
        raise RequestError(f"{count} is no {what}.")


def check_ids(ids: Sequence[PushId], settled: PushId) -> None:
    """RequestError where a push has no ids, or one twice, or says that is settled what comes behind its own epoch.

    What is settled counts as applied: with a wrong one all pushes to come would be acknowledged, and none applied.
    """
    if not ids or len(set(ids)) != len(ids):
        raise RequestError(f"A push has the ids {ids[:9]}, which are none, or twice the same.")
    if not all(0 <= number < MOST for id in (*ids, settled) for number in id):
        raise RequestError(f"A push has the ids {ids[:9]} and settles {settled}, which is no place in a run.")
    if settled > (max(ids)[0] + 1, 0, 0):
        raise RequestError(f"A push of {max(ids)} settles what comes before {settled}, which is behind it.")


def has_twice(keys: np.ndarray) -> bool:
    """Whether a key is there more than once: a table would make two rows of it."""
    if len(keys) < 2 or bool((keys[1:] > keys[:-1]).all()):
        return False
    # Half as wide they are ordered in two thirds of the time; whether two that look alike are, only then.
    halves = np.ascontiguousarray(keys).view(np.uint32)
    ordered: np.ndarray = halves[::2] ^ halves[1::2]
    ordered.sort()
    return bool((ordered[1:] == ordered[:-1]).any()) and len(np.unique(keys)) < len(keys)


def _check_numbers(name: str, tensor: torch.Tensor) -> None:
    # Infinite is what some model masks with; a sum is no number where one of its numbers is none.
    if tensor.is_floating_point() and bool(torch.isnan(tensor.sum())) and bool(torch.isnan(tensor).any()):
        raise RequestError(f"There is something in {name} that is no number.")


def check_groups(dense: DensePart, groups: Sequence[Numbers] | None) -> None:
    """RequestError where hyperparameters are not of the form of those that are there; schedulers add numbers of their own."""
    present = dense.groups
    if not groups or not present:
        return
    if len(groups) > len(present):
        raise RequestError(f"There are hyperparameters of {len(groups)} groups where there are {len(present)}.")
    for own, group, fixed in zip(present, groups, dense.fixed, strict=False):
        for key, value in group.items():
            if key in fixed or not _alike(own.get(key, value), value):
                raise RequestError(f"The hyperparameter {key!r} cannot be {value!r}.")


def _alike(own: Any, value: Any) -> bool:
    if isinstance(own, (tuple, list)):
        return isinstance(value, (tuple, list)) and len(own) == len(value) and all(map(_alike, own, value))
    return _can_be_sent(value) and (fits(value) or value == own)


def _can_be_sent(value: Any) -> bool:
    return is_number(value) and (isinstance(value, float) or abs(value) < MOST)


def fits(value: float) -> bool:
    """Whether a number can be a factor of tensors of any dtype that is trained."""
    return abs(value) < _LARGEST


def check_snapshot(dense: DensePart, tables: Mapping[int, Table], snapshot: Snapshot, whole: bool) -> None:
    """RequestError where a snapshot is not one of these pieces and tables, or of some of them."""
    kept = snapshot.kept
    weights, states, rows = set(), dict[int, dict[str, Any]](), dict[int, dict[str, torch.Tensor]]()
    for name, tensor in snapshot.tensors.items():
        kind, number, rest = parse_name(name)
        _check_numbers(name, tensor)
        if kind == "rows":
            rows.setdefault(number, {})[rest] = tensor
            continue
        piece = dense.pieces.get(number)
        if piece is None or rest:
            raise RequestError(f"There is no piece for {name} here.")
        if kind.startswith("state."):
            states.setdefault(number, {})[kind.removeprefix("state.")] = tensor
        elif kind != "weights" or tensor.dtype != piece.dtype or tensor.numel() != piece.numel:
            raise RequestError(f"{name} is {tensor.numel()} of {tensor.dtype} where {piece.numel} of {piece.dtype} belong.")
        else:
            weights.add(number)
    if whole:
        _check_kept(dense, kept, weights)
    for text, numbers in kept.numbers.items():
        number = parse_number(text)
        for key, value in numbers.items():
            if key in states.get(number, {}) or not (value is None or isinstance(value, bool) or _can_be_sent(value)):
                raise RequestError(f"The optimizer keeps no {value!r} as {key} of piece {text}.")
            states.setdefault(number, {})[key] = value
    for number, state in states.items():
        if number not in weights:
            raise RequestError(f"There is optimizer state of piece {number}, and no weights.")
        _check_state(number, state, dense.form(number))
    for number, tensors in rows.items():
        table = tables.get(number)
        if table is None:
            raise RequestError(f"There is no table {number} here.")
        shape = _shape_of_sketch(table.spec, kept.row_shards.get(str(number))) if "sketch" in tensors else None
        check_rows(number, table.spec, tensors, shape)


def _shape_of_sketch(spec: TableSpec, shards: Sequence[int] | None) -> tuple[int, ...] | None:
    """The shape of what a table has counted of some shards; of all where that is not said."""
    own = tuple(shards or range(spec.shards))
    if len(own) > spec.shards or len(set(own)) < len(own) or not all(0 <= shard < spec.shards for shard in own):
        raise RequestError(f"The shards {own[:9]} are none of a table, or one of them is there twice.")
    return sketch_shape(spec, len(own))


def _check_kept(dense: DensePart, kept: Kept, weights: set[int]) -> None:
    check_count("version", kept.version)
    check_groups(dense, kept.groups)
    if weights != set(dense.pieces):
        raise RequestError(f"A whole snapshot has {len(weights)} pieces where {len(dense.pieces)} belong.")


def parse_name(name: str) -> tuple[str, int, str]:
    """The parts of a tensor's name in a snapshot: ``KIND/NUMBER`` or ``rows/NUMBER/REST``. RequestError where it is none."""
    kind, _, rest = name.partition("/")
    number, _, more = rest.partition("/")
    return kind, parse_number(number), more


def parse_number(text: str) -> int:
    """The number of a piece or a table. RequestError where it is none."""
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise RequestError(f"{text!r} is no number of a piece or a table.")
    return int(text)


def _check_state(number: int, state: Mapping[str, Any], form: Form | None) -> None:
    """Of an optimizer of which it is not known what it keeps, the tensors have to be such as a step could have made."""
    if form is None:
        return
    for key, value in state.items():
        if key not in form:
            raise RequestError(f"The optimizer keeps no {key} of piece {number}.")
        like = form[key]
        if isinstance(value, torch.Tensor) != isinstance(like, torch.Tensor):
            raise RequestError(f"What the optimizer keeps as {key} of piece {number} is not of that kind.")
        if isinstance(value, torch.Tensor) and (value.numel(), value.dtype) != (like.numel(), like.dtype):
            raise RequestError(
                f"{key} of piece {number} is {value.numel()} of {value.dtype} where {like.numel()} of {like.dtype} belong."
            )
    missing = [key for key, like in form.items() if isinstance(like, torch.Tensor) and key not in state]
    if missing and state:
        raise RequestError(f"The optimizer's {missing[0]} of piece {number} is missing.")


def check_rows(
    number: int, spec: TableSpec, tensors: Mapping[str, torch.Tensor], sketch: tuple[int, ...] | None = None
) -> None:
    """RequestError where tensors are not rows of a table; ``sketch``: the shape of what it counts, where it counts."""
    if not set(tensors) - {"sketch"} == {"values", *_ROWS}:
        raise RequestError(f"The rows of table {number} are not whole.")
    count = tensors["keys"].numel()
    for name, dtype in _ROWS.items():
        if tensors[name].dtype != dtype or tuple(tensors[name].shape) != (count,):
            raise RequestError(f"The {name} of the rows of table {number} are none.")
    values, counts = tensors["values"], tensors["counts"]
    if values.dtype not in (torch.float32, torch.float64) or tuple(values.shape) != (count, spec.width + spec.state):
        raise RequestError(f"Rows of {tuple(values.shape)} {values.dtype} are none of table {number}.")
    if count and not (int(counts.min()) >= 0 and int(counts.max()) < 1 << 32 and int(tensors["last"].min()) >= 0):
        raise RequestError(f"The rows of table {number} have counts or steps that are none.")
    if has_twice(tensors["keys"].numpy()):
        raise RequestError(f"The rows of table {number} have a key twice.")
    counted = tensors.get("sketch")
    if sketch is not None and counted is not None and (counted.dtype != torch.int16 or tuple(counted.shape) != sketch):
        raise RequestError(f"What table {number} is to have counted is of another form.")
