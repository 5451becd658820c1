"""Collecting garbage between steps, in all workers of the arena after the same ones.

CPython looks for cycles among new objects whenever there are so many of them: in a worker now and then for a tenth of a
millisecond or more, each worker at moments of its own, and the others wait for it every time. Most training steps leave no cycles
behind. For these the collector is kept off, and called for while workers wait for each other anyway, as torchtitan
(``gc_freq``) and Megatron-LM (``manual_gc``) do for jobs of many machines.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator

_WARM_UP, _EVERY = 8, 64
# As often as CPython by itself: each generation ten times as seldom as the one before.
_RATIO = 10


class Garbage:
    """When a worker collects garbage. ``between`` is called once in each step, when this worker's part of it is published."""

    def __init__(self) -> None:
        self._steps = 0
        self._watches = gc.isenabled()

    def between(self) -> None:
        """Collect where it is time to. A job whose steps leave cycles behind gets Python's own way back, for good."""
        if not self._watches:
            return
        self._steps += 1
        if self._steps == _WARM_UP:
            gc.disable()
            # What there was before is none of the steps'.
            gc.collect()
        elif self._steps == 2 * _WARM_UP or self._steps % _EVERY == 0:
            turn = self._steps // _EVERY
            generation = 0 if turn % _RATIO else 1 if turn % _RATIO**2 else 2
            if gc.collect(generation if turn else 0):
                self._watches = False
                gc.enable()

    @contextlib.contextmanager
    def automatic(self) -> Iterator[None]:
        """Meanwhile Python collects as it does by itself: for what is not a step."""
        if not self._watches or gc.isenabled():
            yield
            return
        gc.enable()
        try:
            yield
        finally:
            # What it has left is none of the steps', either.
            gc.collect(1)
            gc.disable()
