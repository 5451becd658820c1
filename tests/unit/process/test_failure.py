"""Telling the user's errors from shoal's own, and carrying both from one process to another."""

from __future__ import annotations

import traceback

import pytest
import torch

from shoal import errors
from shoal.process.failure import Failure, _without_shoal, user_code
from shoal.train.evaluate import Metrics
from shoal.train.objective import Outcome


def theirs(*_: object) -> float:
    raise ValueError("first line.\nsecond line")


def test_only_their_part_of_the_traceback() -> None:
    # Through shoal's own code, and torch's decorators around that.
    outcome = Outcome(torch.zeros(()), 1.0, is_sum=False, measured=False, output=torch.zeros(1), target=None)
    with pytest.raises(ValueError) as raised:
        Metrics({"wrong": theirs}).update(outcome)
    assert raised.value.__traceback__ is not None
    # As it is in a worker, where the loop is shoal's: without this test's own frame.
    error = raised.value.with_traceback(raised.value.__traceback__.tb_next)
    text = "".join(traceback.format_tb(_without_shoal(error.__traceback__)))
    assert "in theirs" in text and "evaluate.py" not in text and "_contextlib.py" not in text


def test_named_with_its_place_and_rank() -> None:
    with pytest.raises(errors.UserCodeError) as caught, user_code("metrics", rank=3):
        theirs()
    error = caught.value
    assert str(error) == "metrics raised ValueError in worker 3: first line."
    assert error.rank == 3
    assert "in theirs" in error.traceback_text and "second line" in error.traceback_text


def test_own_errors_pass_through() -> None:
    with pytest.raises(errors.JobError), user_code("the loss"):
        raise errors.JobError("The loss is no tensor; return one.")


@pytest.mark.parametrize(
    "error",
    [
        errors.JobError("Wrong; do right."),
        errors.LossNotFiniteError("The loss became nan; look at it."),
        errors.UserCodeError("model raised KeyError: x.", "Traceback", 1),
    ],
)
def test_same_error_on_the_other_side(error: errors.ShoalError) -> None:
    again = Failure.of(error, rank=1).error()
    assert type(again) is type(error) and str(again) == str(error)
    assert getattr(again, "rank", 1) == 1


def test_a_bug_of_ours_keeps_its_traceback() -> None:
    try:
        theirs()
    except ValueError as error:
        again = Failure.of(error).error()
    assert isinstance(again, RuntimeError) and "in theirs" in str(again)
