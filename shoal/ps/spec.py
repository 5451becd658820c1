"""What a table of rows is: a value that can be sent to another process."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from shoal.errors import JobError
from shoal.ps.initialisers import Initialiser, Normal
from shoal.ps.optimizers import Adagrad, RowOptimizer

HEAD_BYTES = 32
MOST_SHARDS = 64
MOST_WIDTH = 16_384
_ALIGN = 16


@dataclass(frozen=True, kw_only=True)
class TableSpec:
    """A table.

    Attributes:
        name: the module's path in the model, for what people are told.
        width: numbers in a row.
        admission: how often a key must have been seen in training before it gets a row (1: at once).
        max_age: steps after which a row that nobody used begins anew; None: never.
        memory_bytes: what rows may take; colder ones go to disk beyond it. None: no limit.
        shards: parts with a lock of their own; a power of two, at most 64.
    """

    name: str = "table"
    width: int
    dtype: torch.dtype = torch.float32
    optimizer: RowOptimizer = field(default_factory=Adagrad)
    init: Initialiser = field(default_factory=Normal)
    admission: int = 1
    max_age: int | None = None
    memory_bytes: int | None = None
    shards: int = MOST_SHARDS
    seed: int = 0

    def __post_init__(self) -> None:
        if not _whole(self.width, 1, MOST_WIDTH):
            raise JobError(f"width is {self.width!r}; give the numbers of a row, a whole number from 1 to {MOST_WIDTH}.")
        if self.dtype not in (torch.float32, torch.float64):
            raise JobError(f"Rows of {self.dtype} are not built; take torch.float32 or torch.float64.")
        if not isinstance(self.optimizer, RowOptimizer):
            raise JobError(
                f"optimizer is {self.optimizer!r}; rows have their own: shoal.ps.SGD, Adagrad, RowWiseAdagrad, Adam or FTRL."
            )
        if not isinstance(self.init, Initialiser):
            raise JobError(f"init is {self.init!r}; give shoal.ps.Zeros, Constant, Uniform or Normal.")
        if not _whole(self.admission, 1, 65_535):
            raise JobError(f"admission is {self.admission!r}; give how often a key is seen before it gets a row, 1 to 65535.")
        if self.max_age is not None and not _whole(self.max_age, 1, 1 << 60):
            raise JobError(f"max_age is {self.max_age!r}; give a number of steps of at least 1, or None.")
        if not _whole(self.shards, 1, MOST_SHARDS) or self.shards & (self.shards - 1):
            raise JobError(f"shards is {self.shards!r}; give a power of two up to {MOST_SHARDS}.")

    @property
    def state(self) -> int:
        """Numbers that the optimizer keeps for a row."""
        return self.optimizer.state(self.width)

    @property
    def row_bytes(self) -> int:
        """A row with its head, weights and state."""
        size = HEAD_BYTES + (self.width + self.state) * self.dtype.itemsize
        return -(-size // _ALIGN) * _ALIGN

    def values(self, raw: np.ndarray) -> torch.Tensor:
        """Bytes (n, …) as the numbers that they are; copied."""
        numbers = np.float32 if self.dtype == torch.float32 else np.float64
        return torch.from_numpy(np.array(raw, order="C").view(numbers))

    @property
    def capacity(self) -> int:
        """The most rows that a shard has room for: its index must not be fuller than 5/8, and rows and undo log have spans."""
        return min((5 << 25) // 8 - 1, ((1 << 34) - (1 << 31) - (1 << 24)) // self.row_bytes)


def _whole(value: object, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
