"""Random streams that depend on where a run is, not on how it got there.

Python's, NumPy's and torch's global generators are seeded again at the beginning of every share of a step, of every
evaluation batch, of every data item, and of every update by an optimizer that may draw, so that a resumed or replaced
worker draws the same numbers.
"""

from __future__ import annotations

import random
import zlib

import numpy as np
import torch
from torch import nn

from shoal.data.order import mix

MODEL, STEP, EVALUATION, ITEM, UPDATE = range(5)


def reseed(*where: int) -> None:
    """Seed the global generators from a place such as (STEP, seed, step, rank, microbatch)."""
    seed = mix(*where)
    random.seed(seed)
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    np.random.seed(seed & 0xFFFFFFFF)


class PartStreams:
    """Random streams of the parts of a model that is cut into stages: the same wherever it is cut.

    Where the stages begin follows from measured times. So every part of the model begins a stream of its own, by its path.
    """

    def __init__(self) -> None:
        self._where: tuple[int, ...] | None = None

    def at(self, *where: int) -> None:
        """Say where the run is, and begin the stream of what comes before the first part."""
        self._where = where
        reseed(*where)

    def rest(self) -> None:
        """Leave the streams alone from now on, as while evaluating."""
        self._where = None

    def begin_at(self, module: nn.Module, path: str) -> None:
        """Let the stream of a part begin whenever it is called."""
        number = zlib.crc32(path.encode())

        def begin(_module: nn.Module, _inputs: object) -> None:
            if self._where is not None:
                reseed(*self._where, number)

        module.register_forward_pre_hook(begin)


def seed_for_model(seed: int) -> None:
    """Seed everything as a script that begins with ``torch.manual_seed(seed)`` does, before the model is built."""
    random.seed(seed)
    torch.manual_seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
