"""Random streams that depend on where a run is, not on how it got there.

Python's, NumPy's and torch's global generators are seeded again at the beginning of every share of a step, of every
evaluation batch, of every data item, and of every update by an optimizer that may draw, so that a resumed or replaced
worker draws the same numbers.
"""

from __future__ import annotations

import random
import sys

import torch

from shoal.data.order import mix

MODEL, STEP, EVALUATION, ITEM, UPDATE = range(5)


def reseed(*where: int) -> None:
    """Seed the global generators from a place such as (STEP, seed, step, rank, microbatch)."""
    seed = mix(*where)
    random.seed(seed)
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_initialized():
        torch.cuda.manual_seed_all(seed)
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        numpy_random.seed(seed & 0xFFFFFFFF)


def seed_for_model(seed: int) -> None:
    """Seed everything as a script that begins with ``torch.manual_seed(seed)`` does, before the model is built."""
    random.seed(seed)
    torch.manual_seed(seed)
    numpy_random = sys.modules.get("numpy.random")
    if numpy_random is not None:
        numpy_random.seed(seed & 0xFFFFFFFF)
