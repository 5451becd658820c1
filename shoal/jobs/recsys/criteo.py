"""DeepFM on generated clicks in Criteo's format: 13 numbers, 26 keys below 2^40 drawn by power laws, and a click.

The format of the Criteo display advertising challenge, without its data: nothing has to be fetched, and it can be as large
as one likes. What somebody clicks on is planted: a key has an effect that follows from the key alone, some pairs of fields
have one together, numbers add to it, and with ``drift`` effects move as time goes on, as tastes do. Keys are scattered over
2^40 by a hash, so no table by position could hold them.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from shoal.job import Job
from shoal.jobs.recsys.clicks_wide_deep import ClickAUC
from shoal.jobs.recsys.deepfm import DeepFM

NAME = "criteo-deepfm"
NUMERIC, CATEGORICAL = 13, 26
# As in Criteo's data: a few fields have a handful of values, some have millions.
SIZES = tuple(int(10 ** (1 + 6 * k / (CATEGORICAL - 1))) for k in range(CATEGORICAL))


@dataclass(frozen=True)
class CriteoRows:
    """Rows of a log, in the order of time.

    Attributes:
        numbers: float32 (rows, 13), log(1 + count) as is usual.
        keys: int64 (rows, 26), each from 1 to 2^40, with the field in the bits above that.
        clicked: float32 (rows,).
        probability: float32 (rows,), the planted one.
    """

    numbers: np.ndarray
    keys: np.ndarray
    clicked: np.ndarray
    probability: np.ndarray


def generate(rows: int, seed: int, start: int = 0, exponent: float = 1.2, drift: float = 0.0) -> CriteoRows:
    """Return rows ``start`` to ``start + rows`` of the stream ``seed``; ``drift``: turns of the effects per million rows."""
    draw = np.random.RandomState((seed * 1_000_003 + start) % 2**32)
    values = np.stack([_power_law(draw, size, rows, exponent) for size in SIZES], axis=1)
    field = np.arange(CATEGORICAL, dtype=np.uint64)
    hashed = _mix(values.astype(np.uint64) * np.uint64(CATEGORICAL) + field)
    keys = ((hashed >> np.uint64(24)) | np.uint64(1)).astype(np.int64) + (np.arange(1, CATEGORICAL + 1, dtype=np.int64) << 40)
    numbers = np.log1p(draw.exponential(3.0, (rows, NUMERIC)).astype(np.int64)).astype(np.float32)
    turn = 2 * np.pi * drift * (start + np.arange(rows)[:, None]) / 1e6
    effect = _normal(hashed, 1) * np.cos(turn) + _normal(hashed, 2) * np.sin(turn)
    score = 0.35 * effect.sum(1) + numbers @ np.linspace(-0.3, 0.3, NUMERIC) - 1.0
    score = score + 0.8 * (_normal(hashed[:, :12], 3) * _normal(hashed[:, 12:24], 3)).mean(1)
    probability = 1.0 / (1.0 + np.exp(-score))
    clicked = draw.random_sample(rows) < probability
    return CriteoRows(numbers, keys, clicked.astype(np.float32), probability.astype(np.float32))


def _power_law(draw: np.random.RandomState, size: int, rows: int, exponent: float) -> np.ndarray:
    """Values below ``size``, value i with a probability about proportional to (i + 1) ** −exponent."""
    u = draw.random_sample(rows)
    power = 1.0 - exponent
    # The inverse of the integral of x ** −exponent from 1 to size + 1: no table of so many values is needed.
    return np.minimum(((1 + u * ((size + 1.0) ** power - 1)) ** (1 / power)).astype(np.int64) - 1, size - 1)


def _mix(x: np.ndarray) -> np.ndarray:
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _normal(hashed: np.ndarray, stream: int) -> np.ndarray:
    """A number for each key that looks normally distributed: the sum of four uniform ones."""
    bits = _mix(hashed ^ _mix(np.full(1, stream, np.uint64)))
    total = sum(((bits >> np.uint64(shift)) & np.uint64(0xFFFF)).astype(np.float64) for shift in (0, 16, 32, 48))
    return (np.asarray(total) - 2 * 65535) / (65536 * np.sqrt(1 / 3))


def model() -> nn.Module:
    """Return the model: called with keys (N, 26) and numbers (N, 13)."""
    return DeepFM(width=16, hidden=(64, 32), single=CATEGORICAL - 1, numeric=NUMERIC)


def train_data() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return 500,000 rows."""
    return _tensors(500_000, 1)


def eval_data() -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Return 50,000 others."""
    return _tensors(50_000, 2)


def _tensors(rows: int, seed: int) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    made = generate(rows, seed)
    inputs = {"keys": torch.from_numpy(made.keys), "numbers": torch.from_numpy(made.numbers)}
    return inputs, torch.from_numpy(made.clicked)


def job() -> Job:
    """Return the job ``criteo-deepfm``."""
    return Job(
        name=NAME,
        model=model,
        train_data=train_data,
        eval_data=eval_data,
        loss=nn.functional.binary_cross_entropy_with_logits,
        optimizer=lambda params: torch.optim.Adam(params, lr=1e-3),
        metrics={"auc": ClickAUC()},
        batch_size=2048,
        epochs=1,
    )
