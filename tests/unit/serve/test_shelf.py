"""What it means that two versions give the same answer."""

from __future__ import annotations

import math

import numpy as np

from shoal.serve.shelf import compare
from shoal.serve.signature import ModelSignature, TensorSignature


def signature(datatype: str, *shape: int) -> ModelSignature:
    return ModelSignature("m", (), (TensorSignature("output", datatype, (-1, *shape)),))


def test_classes_are_the_same_where_the_largest_is() -> None:
    one, other = np.float32([[0, 3, 1]]), np.float32([[0, 1, 0.5]])
    assert compare(signature("FP32", 3), [one], [other]) == (2.0, True)
    assert compare(signature("FP32", 3), [one], [other[:, ::-1]]) == (2.0, True)
    assert compare(signature("FP32", 3), [one], [np.float32([[4, 3, 1]])]) == (4.0, False)


def test_whole_numbers_are_the_same_where_equal() -> None:
    assert compare(signature("INT64"), [np.array([5])], [np.array([5])]) == (0.0, True)
    assert compare(signature("INT64"), [np.array([5])], [np.array([7])]) == (2.0, False)


def test_numbers_that_are_not_finite() -> None:
    spec = signature("FP32", 1)
    nan, inf, one = (np.float32([[value]]) for value in (math.nan, math.inf, 1.0))
    assert compare(spec, [nan], [nan])[0] == 0.0
    assert compare(spec, [inf], [inf])[0] == 0.0
    assert compare(spec, [nan], [one])[0] == math.inf
    assert compare(spec, [inf], [one])[0] == math.inf


def test_bfloat16_is_compared_as_the_number_it_stands_for() -> None:
    one, two = np.array([[0x3F80]], np.uint16), np.array([[0x4000]], np.uint16)
    assert compare(signature("BF16", 1), [one], [two])[0] == 1.0
