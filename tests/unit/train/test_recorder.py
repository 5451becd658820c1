from __future__ import annotations

from typing import Any

import pytest

from shoal.train.recorder import Goal


def losses(*values: float) -> list[dict[str, Any]]:
    return [{"loss": 9.0, "eval_loss": value} for value in values]


@pytest.mark.parametrize(
    ("until", "entry", "reached"),
    [
        ({"eval_accuracy": 0.6}, {"eval_accuracy": 0.6}, True),
        ({"eval_accuracy": 0.6}, {"eval_accuracy": 0.59}, False),
        ({"eval_loss": 0.6}, {"eval_loss": 0.6}, True),
        ({"loss": 0.6}, {"loss": 0.61}, False),
        ({"eval_accuracy": 0.6, "loss": 0.6}, {"eval_accuracy": 0.7, "loss": 0.7}, False),
        ({"eval_accuracy": 0.6, "loss": 0.6}, {"eval_accuracy": 0.7, "loss": 0.5}, True),
        ({"eval_auc": 0.6}, {"loss": 0.1}, False),
        ({"eval_accuracy": 0.6}, {"eval_accuracy": float("nan")}, False),
    ],
)
def test_until(until: dict[str, float], entry: dict[str, float], reached: bool) -> None:
    assert Goal(until, None).reached([entry]) == ("until" if reached else None)


@pytest.mark.parametrize(
    ("values", "enough"),
    [
        ((3.0,), False),
        ((3.0, 4.0), False),
        ((3.0, 4.0, 5.0), True),
        ((3.0, 3.0, 3.0), True),
        ((3.0, 4.0, 2.9), False),
        ((3.0, 2.0, 2.5, 2.1), True),
    ],
)
def test_patience_counts_epochs_since_the_best_evaluation_loss(values: tuple[float, ...], enough: bool) -> None:
    assert Goal(None, 2).reached(losses(*values)) == ("patience" if enough else None)


def test_without_evaluation_or_wishes_training_goes_on() -> None:
    assert Goal(None, 1).reached([{"loss": 1.0}, {"loss": 2.0}, {"loss": 3.0}]) is None
    assert Goal(None, None).reached(losses(1.0, 2.0, 3.0)) is None
