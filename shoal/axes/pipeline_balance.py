"""How long the parts of a model take, and how they are put together to stages of about equal cost."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils import _pytree as pytree

from shoal.axes.pipeline_trace import tensors_in

Compute = Callable[[nn.Module, Any], torch.Tensor]
"""Computes the loss of an example with a model: a scalar to differentiate."""


def balance(costs: Sequence[float], stages: int, holders: Sequence[int] | None = None) -> tuple[int, ...]:
    """Where to begin the stages after the first so that the dearest one costs as little as possible.

    By dynamic programming over contiguous parts; among equals the sum of squares is smallest. Returns the indices of the
    first part of each stage but the first; every stage has at least one part. Raises ValueError for too few parts.

    ``holders``: which rank holds each stage. Where one holds several, they are then moved for as long as the rank with most
    to do gets less.
    """
    count = len(costs)
    if stages > count:
        raise ValueError(f"{count} parts make no {stages} stages.")
    sums = [0.0]
    for cost in costs:
        sums.append(sums[-1] + cost)
    best: list[dict[int, tuple[float, float, tuple[int, ...]]]] = [{0: (0.0, 0.0, ())}]
    for stage in range(1, stages + 1):
        row: dict[int, tuple[float, float, tuple[int, ...]]] = {}
        for end in range(stage, count - (stages - stage) + 1):
            options = []
            for start, (most, squares, cuts) in best[-1].items():
                if start < end:
                    own = sums[end] - sums[start]
                    options.append((max(most, own), squares + own * own, (*cuts, start) if start else cuts))
            row[end] = min(options)
        best.append(row)
    cuts = best[-1][count][2]
    return cuts if holders is None or len(set(holders)) == stages else _spread(sums, cuts, holders)


def _spread(sums: Sequence[float], cuts: tuple[int, ...], holders: Sequence[int]) -> tuple[int, ...]:
    """Move one or two beginnings of stages at a time to where the rank with most to do gets least."""

    def dearest(tried: Sequence[int]) -> tuple[float, float]:
        work = dict.fromkeys(holders, 0.0)
        squares = 0.0
        for holder, start, end in zip(holders, (0, *tried), (*tried, len(sums) - 1), strict=True):
            work[holder] += sums[end] - sums[start]
            squares += (sums[end] - sums[start]) ** 2
        return max(work.values()), squares

    def neighbours() -> Iterator[tuple[int, ...]]:
        for first, second in itertools.combinations_with_replacement(range(len(cuts)), 2):
            for moves in itertools.product((-1, 0, 1), repeat=2):
                tried = list(cuts)
                tried[first] += moves[0]
                tried[second] += moves[1]
                if all(a < b for a, b in itertools.pairwise((0, *tried, len(sums) - 1))):
                    yield tuple(tried)

    while True:
        found = min(neighbours(), key=dearest)
        if dearest(found) >= dearest(cuts):
            return cuts
        cuts = found


def measure(model: nn.Module, example: Any, compute: Compute, paths: Sequence[str], repeats: int = 3) -> list[float]:
    """Seconds for forward and backward pass of each part that a module of ``paths`` begins, and first of what is before.

    The shortest of a few tries. Gradients are dropped as they come.
    """
    best = [float("inf")] * (len(paths) + 1)
    for _ in range(repeats):
        for index, seconds in enumerate(_time_once(model, example, compute, paths)):
            best[index] = min(best[index], seconds)
    return best


def _time_once(model: nn.Module, example: Any, compute: Compute, paths: Sequence[str]) -> list[float]:
    forward: dict[int, float] = {}
    backward: dict[int, float] = {}

    def marks(index: int) -> Callable[..., None]:
        def mark(_module: nn.Module, args: Any, kwargs: Any) -> None:
            forward[index] = time.perf_counter()
            tensor = next((t for t in tensors_in(pytree.tree_leaves((args, kwargs))) if t.requires_grad), None)
            if tensor is not None:

                def reached(_gradient: torch.Tensor) -> None:
                    backward[index] = time.perf_counter()

                tensor.register_hook(reached)

        return mark

    handles = [
        model.get_submodule(path).register_forward_pre_hook(marks(index), with_kwargs=True)
        for index, path in enumerate(paths)
    ]
    handles += [p.register_post_accumulate_grad_hook(_drop) for p in model.parameters() if p.requires_grad]
    try:
        began = time.perf_counter()
        loss = compute(model, example)
        turned = time.perf_counter()
        loss.backward()  # type: ignore[no-untyped-call]
        ended = time.perf_counter()
    finally:
        for handle in handles:
            handle.remove()
    up = [began, *(forward.get(index, began) for index in range(len(paths))), turned]
    seconds = [b - a for a, b in zip(up, up[1:], strict=False)]
    # Backwards, the last part comes first; a place that no gradient reached has what is before it in one piece.
    later = turned
    for index in range(len(paths), 0, -1):
        reached_at = backward.get(index - 1, later)
        seconds[index] += max(0.0, reached_at - later)
        later = max(later, reached_at)
    seconds[0] += ended - later
    return seconds


def _drop(parameter: torch.Tensor) -> None:
    parameter.grad = None
