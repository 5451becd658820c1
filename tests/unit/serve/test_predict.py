"""What a data set is answered with, and how far it is."""

from __future__ import annotations

import numpy as np
import pytest

from shoal.errors import RequestError
from shoal.serve.offline import Pace
from shoal.serve.predict import Kept, PredictOptions, Progress, choose_pace
from shoal.serve.signature import ModelSignature, TensorSignature
from shoal.serve.slots import SlotLayout
from shoal.serve.tables.answers import Answers

_X = TensorSignature("x", "FP32", (-1, 2))
_FIXED = ModelSignature("net", (_X,), (_X,))
_IDS = TensorSignature("ids", "INT64", (-1, -1), longest=64)
_TEXT = ModelSignature("text", (_IDS,), (_X,))


def _pace(measured: dict[int, float], wanted: int | None, signature: ModelSignature = _FIXED) -> Pace:
    return choose_pace(measured, SlotLayout.of(signature, 100, 3, 32), signature, wanted)


def test_the_batch_is_the_cheapest_unless_one_was_asked_for() -> None:
    measured = {1: 1.0, 2: 1.0, 4: 1.0}
    assert _pace(measured, None) == Pace(window=4, batch=4, units=4)
    assert _pace(measured, 3) == Pace(window=3, batch=3, units=3)
    with pytest.raises(RequestError, match="A batch of 1,000 rows is more than a replica takes; give at most 32"):
        _pace(measured, 1000)
    # A row alone may take as long as it takes; 16 of them would be taken for a process that hangs.
    assert _pace({1: 12.0}, 1).batch == 1
    with pytest.raises(RequestError, match="A batch of 16 rows would take 192 s; give a smaller"):
        _pace({1: 12.0}, 16)


def test_rows_with_lengths_are_read_in_windows_and_batched_by_their_work() -> None:
    assert _pace({1: 1.0, 4: 1.0, 16: 1.0, 64: 16.0}, None, _TEXT) == Pace(window=50, batch=32, units=16)
    assert _pace({1: 1.0, 4: 1.0}, 5, _TEXT) == Pace(window=50, batch=5, units=40)


def test_answers_with_lengths_are_kept_without_their_padding() -> None:
    signature = ModelSignature("text", (_IDS,), (_IDS, _X))
    kept = Kept(signature)
    for first in (0, 4):
        ids, x = np.arange(first, first + 4).reshape(2, 2), np.full((2, 2), first, "f4")
        kept.put(Answers([ids, x], lengths=np.array([1, 2])), None)
    found = kept.arrays()
    assert [row.tolist() for row in found["ids"]] == [[0], [2, 3], [4], [6, 7]]
    assert found["x"].tolist() == [[0, 0], [0, 0], [4, 4], [4, 4]]


@pytest.mark.parametrize(
    ("option", "words"), [("replicas", "0 replicas"), ("batch_size", "0 rows in a batch"), ("limit", "0 rows as")]
)
def test_options_that_make_no_sense(option: str, words: str) -> None:
    with pytest.raises(RequestError, match=f"{words}.*give at least 1"):
        PredictOptions(**{option: 0}).check()


def test_the_time_left_counts_what_this_process_has_done() -> None:
    progress = Progress(rows=60, new=10, elapsed_s=5.0, total=100, fraction=0.6, began_at=0.5)
    assert progress.rows_per_s == 2.0 and progress.left_s == pytest.approx(20.0)
    unknown = Progress(rows=0, new=0, elapsed_s=0.0, total=None, fraction=None, began_at=0.0)
    assert unknown.rows_per_s == 0.0 and unknown.left_s is None
