"""Values become what the model takes, or it is said why not."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shoal.serve.signature import TensorSignature
from shoal.serve.tables.rows import bfloat16_bits, fit, floats, reshaped


def _spec(datatype: str, *shape: int) -> TensorSignature:
    return TensorSignature("x", datatype, (-1, *shape))


@pytest.mark.parametrize(
    ("values", "datatype", "expected"),
    [
        (np.array([1, 2]), "FP32", np.array([1, 2], "f4")),
        (np.array([0.1, np.nan, np.inf]), "FP32", np.array([0.1, np.nan, np.inf], "f4")),
        (np.array([1.0, 255.0]), "UINT8", np.array([1, 255], "u1")),
        (np.array([2**53 + 1]), "INT64", np.array([2**53 + 1], "i8")),
        (np.array([0, 1]), "BOOL", np.array([False, True])),
        (np.array([True, False]), "FP16", np.array([1, 0], "f2")),
        (np.array([], "i8"), "UINT8", np.array([], "u1")),
    ],
)
def test_values_that_fit(values: np.ndarray, datatype: str, expected: np.ndarray) -> None:
    found = fit(values, _spec(datatype))
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    ("values", "datatype", "message"),
    [
        (np.array([256]), "UINT8", "outside 0 to 255"),
        (np.array([-1.0]), "UINT8", "outside 0 to 255"),
        (np.array([0.5]), "INT32", "fraction"),
        (np.array([np.nan]), "INT32", "fraction"),
        (np.array([2]), "BOOL", "outside 0 to 1"),
        (np.array([1e39]), "FP32", "beyond what FP32 holds"),
        (np.array([1e39]), "BF16", "beyond what BF16 holds"),
        (np.array(["a"]), "FP32", "does not hold numbers"),
        (np.array([None]), "FP32", "does not hold numbers"),
    ],
)
def test_values_that_do_not(values: np.ndarray, datatype: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fit(values, _spec(datatype))


def test_bfloat16_is_rounded_as_torch_does() -> None:
    values = np.random.default_rng(0).standard_normal(1000).astype("f4") * np.logspace(-30, 30, 1000).astype("f4")
    values = np.concatenate([values, np.array([0.0, -0.0, np.inf, -np.inf, 1.00390625, 1.01171875], "f4")])
    expected = torch.from_numpy(values).bfloat16()
    assert np.array_equal(bfloat16_bits(values), expected.view(torch.uint16).numpy())
    assert np.array_equal(floats(bfloat16_bits(values), _spec("BF16")), expected.float().numpy())
    assert np.isnan(floats(bfloat16_bits(np.array([np.nan], "f4")), _spec("BF16")))[0]


def test_a_row_comes_in_its_shape_or_flat() -> None:
    values = np.arange(6)
    assert reshaped(values, _spec("INT64", 2, 3)).shape == (2, 3)
    assert reshaped(values.reshape(2, 3), _spec("INT64", 2, 3)).shape == (2, 3)
    for wrong in (values.reshape(3, 2), values[:5]):
        with pytest.raises(ValueError, match="the shape"):
            reshaped(wrong, _spec("INT64", 2, 3))
