"""Shapes of split tensors: views, transposes, cutting, joining and indexing; see ``tensor_cut``."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from shoal.axes.tensor_cut import Cut, Team, Widths

MOST_BLOCKS = 8


def regroup(old: Sequence[int], new: Sequence[int], dim: int, widths: Widths) -> tuple[int, Widths] | tuple[int, ...]:
    """Where the split dim of a tensor lies after a view from shape ``old`` to ``new``, and how it is split there.

    Returns (dim, widths), or where a part of ``old`` is no part of ``new`` the new dims that the split one would fall
    into.
    """
    i = j = 0
    while i < len(old):
        low, first = i, j
        a, b = old[i], new[j]
        i, j = i + 1, j + 1
        while a != b:
            if a < b:
                a, i = a * old[i], i + 1
            else:
                b, j = b * new[j], j + 1
        if low <= dim < i:
            # Dims of length 1 at the end belong to nobody; they change nothing.
            return _within(old[low:i], new[first:j], dim - low, first, widths)
    raise AssertionError("the split dim is beyond the shape")


def _within(
    old: Sequence[int], new: Sequence[int], dim: int, first: int, widths: Widths
) -> tuple[int, Widths] | tuple[int, ...]:
    """The same within a smallest group of dims that is as long before as after."""
    inner = math.prod(old[dim + 1 :])
    flat = tuple(tuple(w * inner for w in block) for block in widths) * math.prod(old[:dim])
    best: tuple[int, int, Widths] | None = None
    for k, size in enumerate(new):
        if size == 1 and len(new) > 1:
            continue
        outside, inside = math.prod(new[:k]), math.prod(new[k + 1 :])
        if len(flat) % outside:
            continue
        count = len(flat) // outside
        pattern = flat[:count]
        if pattern * outside != flat or sum(map(sum, pattern)) != size * inside:
            continue
        if any(w % inside for block in pattern for w in block):
            continue
        if best is None or count < best[0]:
            best = count, first + k, tuple(tuple(w // inside for w in block) for block in pattern)
    return best[1:] if best is not None else tuple(new)


def _view(team: Team, x: Cut, shape: Sequence[int]) -> Any:
    old = tuple(x.shape)
    total = math.prod(old)
    new = [int(s) for s in shape]
    if -1 in new:
        known = -math.prod(new)
        if known == 0 or total % known:
            return NotImplemented
        new[new.index(-1)] = total // known
    if math.prod(new) != total or total == 0 or x.whole_size == 1:
        return NotImplemented
    found = regroup(old, new, x.split_dim, x.widths)
    if not (len(found) == 2 and isinstance(found[1], tuple)):
        if team.report is not None:
            team.report("view", "view", x.origins, found)  # type: ignore[arg-type]
        return NotImplemented
    dim, widths = found
    if team.report is not None and len(new) > len(old):
        team.report("fits", "view", x.origins, (new[dim],))
    parts = []
    for member, part in zip(team.members, x.parts, strict=True):
        new[dim] = sum(block[member] for block in widths)
        parts.append(part.reshape(new))
    return x.like(tuple(parts), dim, widths)


def _shape_argument(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if len(args) == 2 and isinstance(args[1], (tuple, list, torch.Size)):
        return args[1]
    return args[1:] or kwargs.get("shape") or kwargs.get("size")


def view(team: Team, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    shape = _shape_argument(args, kwargs)
    if not shape or not all(isinstance(s, int) for s in shape):
        return NotImplemented
    return _view(team, args[0], shape)


def view_as(team: Team, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _view(team, args[0], tuple(args[1].shape)) if isinstance(args[0], Cut) else args[0].reshape(args[1].shape)


def flatten(team: Team, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x = args[0]
    start = kwargs.get("start_dim", args[1] if len(args) > 1 else 0) % x.ndim
    end = kwargs.get("end_dim", args[2] if len(args) > 2 else -1) % x.ndim
    shape = tuple(x.shape)
    return _view(team, x, (*shape[:start], math.prod(shape[start : end + 1]), *shape[end + 1 :]))


def unflatten(team: Team, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, dim = args[0], kwargs.get("dim", args[1] if len(args) > 1 else None)
    sizes = kwargs.get("sizes", args[2] if len(args) > 2 else None)
    if dim is None or sizes is None or len(args) > 3:
        return NotImplemented
    dim, shape, sizes = dim % x.ndim, tuple(x.shape), list(sizes)
    if -1 in sizes:
        sizes[sizes.index(-1)] = shape[dim] // -math.prod(sizes)
    return _view(team, x, (*shape[:dim], *sizes, *shape[dim + 1 :]))


def transpose(team: Team, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, ndim = args[0], args[0].parts[0].ndim
    given = list(args[1:]) + [kwargs[k] for k in ("dim0", "dim1", "axis0", "axis1") if k in kwargs]
    a, b = (d % ndim for d in given) if given else (ndim - 2, ndim - 1)
    dim = b if x.split_dim == a else a if x.split_dim == b else x.split_dim
    return x.like(tuple(p.transpose(a, b) for p in x.parts), dim)


def permute(team: Team, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x = args[0]
    given = args[1:] or (kwargs["dims"],)
    if len(given) == 1 and not isinstance(given[0], int):
        given = tuple(given[0])
    order = [d % x.parts[0].ndim for d in given]
    return x.like(tuple(p.permute(order) for p in x.parts), order.index(x.split_dim))


def movedim(team: Team, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Where a dim goes is read from a tensor whose dims all have lengths of their own."""
    x = args[0]
    lengths = torch.empty(tuple(range(2, 2 + x.parts[0].ndim)), device="meta")
    dim = list(func(lengths, *args[1:], **kwargs).shape).index(x.split_dim + 2)
    return x.like(tuple(func(p, *args[1:], **kwargs) for p in x.parts), dim)


def unsqueeze(team: Team, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, at = args[0], kwargs.get("dim", args[1] if len(args) > 1 else 0)
    at %= x.parts[0].ndim + 1
    return x.like(tuple(p.unsqueeze(at) for p in x.parts), x.split_dim + (at <= x.split_dim))


def squeeze(team: Team, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, shape = args[0], tuple(args[0].shape)
    which = kwargs.get("dim", args[1] if len(args) > 1 else tuple(range(len(shape))))
    dims = [d % len(shape) for d in ((which,) if isinstance(which, int) else which)]
    return _view(team, x, [s for d, s in enumerate(shape) if not (s == 1 and d in dims)])


def expand(team: Team, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, shape = args[0], _shape_argument(args, kwargs)
    if not isinstance(x, Cut) or not shape:
        return NotImplemented
    sizes, dim = list(shape), x.split_dim + len(shape) - x.parts[0].ndim
    if sizes[dim] not in (-1, x.whole_size):
        return NotImplemented
    sizes[dim] = -1
    return x.like(tuple(p.expand(sizes) for p in x.parts), dim)


def repeat(team: Team, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x, counts = args[0], list(_shape_argument(args, kwargs) or ())
    dim = x.split_dim + len(counts) - x.parts[0].ndim
    if not counts or counts[dim] != 1:
        return NotImplemented
    return x.like(tuple(p.repeat(counts) for p in x.parts), dim)


def repeat_interleave(team: Team, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    x = args[0]
    times = kwargs.get("repeats", args[1] if len(args) > 1 else None)
    dim = kwargs.get("dim", args[2] if len(args) > 2 else None)
    if not isinstance(times, int) or dim is None:
        return NotImplemented
    dim %= x.parts[0].ndim
    widths = x.widths if dim != x.split_dim else tuple(tuple(w * times for w in block) for block in x.widths)
    return x.like(tuple(p.repeat_interleave(times, dim) for p in x.parts), x.split_dim, widths)


def divide(team: Team, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """chunk, split and unbind: across the split dim only where the borders are those of its blocks."""
    x, name = args[0], func.__name__
    ndim = x.parts[0].ndim
    default = 0 if name == "unbind" else 1
    size = args[1] if len(args) > 1 and name != "unbind" else next(
        (kwargs[k] for k in ("chunks", "split_size_or_sections", "split_size") if k in kwargs), None
    )  # fmt: skip
    place = 2 if default else 1
    dim = kwargs.get("dim", args[place] if len(args) > place else 0) % ndim
    if dim != x.split_dim:
        pieces = [func(p, *args[1:], **kwargs) for p in x.parts]
        at = x.split_dim - (name == "unbind" and dim < x.split_dim)
        return tuple(x.like(tuple(piece[k] for piece in pieces), at) for k in range(len(pieces[0])))
    total = x.whole_size
    if name == "unbind":
        lengths = [1] * total
    elif name == "chunk":
        step = -(-total // size)
        lengths = [min(step, total - k) for k in range(0, total, step)]
    elif isinstance(size, int):
        lengths = [min(size, total - k) for k in range(0, total, size)]
    else:
        lengths = list(size or ())
    blocks = [sum(block) for block in x.widths]
    if name == "unbind" or lengths != blocks:
        if team.report is not None and 1 < len(lengths) <= MOST_BLOCKS:
            team.report("blocks", name, x.origins, tuple(lengths))
        return NotImplemented
    cuts = [p.split([block[t] for block in x.widths], dim) for t, p in zip(team.members, x.parts, strict=True)]
    return tuple(x.like(tuple(c[k] for c in cuts), dim, (block,)) for k, block in enumerate(x.widths))


def _one_block(team: Team, x: Cut, low: int, high: int) -> Any:
    """The part of the split dim from ``low`` to ``high``, where that is a block."""
    begin = 0
    for index, block in enumerate(x.widths):
        if (begin, begin + sum(block)) == (low, high):
            offset = [sum(b[t] for b in x.widths[:index]) for t in range(team.ways)]
            parts = tuple(
                p.narrow(x.split_dim, offset[t], block[t]) for t, p in zip(team.members, x.parts, strict=True)
            )
            return x.like(parts, x.split_dim, (block,))
        begin += sum(block)
    if team.report is not None and 0 <= low < high:
        team.report("slice", "slice", x.origins, (low, high, x.whole_size))
    return NotImplemented


def narrow(team: Team, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if len(args) != 4:
        return NotImplemented
    x, dim, start, length = args
    dim %= x.parts[0].ndim
    if dim == x.split_dim:
        return _one_block(team, x, start, start + length)
    return x.like(tuple(p.narrow(dim, start, length) for p in x.parts), x.split_dim)


def select(team: Team, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    if len(args) != 3 or not isinstance(args[2], int):
        return NotImplemented
    x, dim = args[0], args[1] % args[0].parts[0].ndim
    if dim == x.split_dim:
        if team.report is not None and 1 < x.whole_size <= MOST_BLOCKS:
            team.report("blocks", "select", x.origins, (1,) * x.whole_size)
        return NotImplemented
    return x.like(tuple(p.select(dim, args[2]) for p in x.parts), x.split_dim - (dim < x.split_dim))


def get_item(team: Team, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Whole numbers, slices, None and ``...``; the split dim stays whole or is cut at its blocks."""
    x, index = args
    if not isinstance(x, Cut):
        return NotImplemented
    index = index if isinstance(index, tuple) else (index,)
    if any(not (i is None or i is Ellipsis or isinstance(i, (int, slice))) or isinstance(i, bool) for i in index):
        return NotImplemented
    ndim, used = x.parts[0].ndim, sum(i is not None and i is not Ellipsis for i in index)
    full = [slice(None)] * (ndim - used)
    where = index.index(Ellipsis) if Ellipsis in index else len(index)
    index = (*index[:where], *full, *index[where + 1 :])
    old = new = 0
    for place, entry in enumerate(index):
        if entry is None:
            new += 1
            continue
        if old == x.split_dim:
            if isinstance(entry, int):
                return select(team, func, (x, old, entry), {})
            low, high, step = entry.indices(x.whole_size)
            if (low, high, step) != (0, x.whole_size, 1):
                if step != 1:
                    return NotImplemented
                x = _one_block(team, x, low, high)
                if x is NotImplemented:
                    return NotImplemented
            index = (*index[:place], slice(None), *index[place + 1 :])
            break
        old, new = old + 1, new + (not isinstance(entry, int))
    return x.like(tuple(p[index] for p in x.parts), new)


def join(team: Team, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """cat and stack along another dim than the split one."""
    tensors = list(args[0] if args else kwargs["tensors"])
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
    first = next(v for v in tensors if isinstance(v, Cut))
    ndim, stacking = first.parts[0].ndim, func.__name__ == "stack"
    dim %= ndim + stacking
    if not stacking and dim == first.split_dim:
        return NotImplemented
    # torch takes an empty vector for nothing at all; caches begin with one.
    tensors = [v for v in tensors if isinstance(v, Cut) or stacking or v.ndim != 1 or v.numel()]
    rows = []
    for value in tensors:
        if isinstance(value, Cut):
            if value.split_dim != first.split_dim or value.widths != first.widths:
                return NotImplemented
            rows.append(value.parts)
        elif value.ndim == ndim and value.shape[first.split_dim] == first.whole_size:
            rows.append(team.enter_part(value, first.split_dim, first.widths))
        else:
            return NotImplemented
    parts = tuple(func(list(row), dim) for row in zip(*rows, strict=True))
    return first.like(parts, first.split_dim + (stacking and dim <= first.split_dim))


def of_last_two(team: Team, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """tril and triu, where the split dim is none of the last two."""
    x = args[0]
    if x.split_dim >= x.parts[0].ndim - 2:
        return NotImplemented
    return x.like(tuple(func(p, *args[1:], **kwargs) for p in x.parts), x.split_dim)


def _only_first(rule: Callable[..., Any]) -> Callable[..., Any]:
    def checked(team: Team, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return rule(team, func, args, kwargs) if args and isinstance(args[0], Cut) else NotImplemented

    return checked


_OWN: dict[str, Callable[..., Any]] = {
    "view": view, "reshape": view, "flatten": flatten, "unflatten": unflatten, "transpose": transpose, "swapaxes": transpose,
    "swapdims": transpose, "t": transpose, "adjoint": transpose, "permute": permute, "movedim": movedim, "moveaxis": movedim,
    "unsqueeze": unsqueeze, "squeeze": squeeze, "repeat": repeat, "repeat_interleave": repeat_interleave, "chunk": divide,
    "split": divide, "unbind": divide, "narrow": narrow, "select": select, "tril": of_last_two, "triu": of_last_two,
}  # fmt: skip
SHAPE_RULES: dict[str, Callable[..., Any]] = {name: _only_first(rule) for name, rule in _OWN.items()} | {
    "view_as": view_as, "reshape_as": view_as, "expand": expand, "__getitem__": get_item, "cat": join, "concat": join,
    "concatenate": join, "stack": join,
}  # fmt: skip
