from __future__ import annotations

import hashlib
import math
import struct

import numpy as np
import pytest
import torch

from shoal.errors import RequestError
from shoal.observe.compare import difference, max_rel_diff, weights_sha256


def test_the_largest_difference_over_tensors_each_against_its_own_largest() -> None:
    a = {"w": torch.tensor([1.0, -4.0]), "b": torch.tensor([0.5])}
    b = {"w": torch.tensor([1.0, -3.0]), "b": torch.tensor([0.25])}
    # w: 1 / 4; b: 0.25 / 0.5
    found = difference(a, b)
    assert found.max_rel_diff == 0.5 and found.tensor == "b"
    # The other way round the scales are those of b: w: 1 / 3; b: 0.25 / 0.25
    assert max_rel_diff(b, a) == 1.0


def test_a_tensor_of_tiny_values_is_held_against_the_whole_model() -> None:
    a = {"w": np.array([100.0]), "tiny": np.array([1e-6, 0.0])}
    b = {"w": np.array([100.0]), "tiny": np.array([0.0, 0.0])}
    assert max_rel_diff(a, b) == pytest.approx(1e-6 / (0.001 * 100.0), rel=1e-12)
    a["tiny"][0] = 0.2  # above the floor of 0.1: its own largest counts
    assert max_rel_diff(a, b) == 1.0


def test_integers_must_be_equal_and_do_not_count_as_the_largest_value() -> None:
    a = {"w": torch.tensor([0.0, 1e-3]), "count": torch.tensor(1_000_000), "mask": torch.tensor([True])}
    b = {**a, "w": torch.tensor([1e-6, 1e-3])}
    assert max_rel_diff(a, b) == pytest.approx(1e-3, rel=1e-5)
    found = difference(a, {**b, "count": torch.tensor(1_000_001), "mask": torch.tensor([False])})
    assert found.max_rel_diff == math.inf and found.unequal_integers == ("count", "mask")


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_what_is_not_finite_never_passes(value: float) -> None:
    bad = {"w": torch.tensor([1.0, value])}
    assert max_rel_diff(bad, {"w": torch.tensor([1.0, 1.0])}) == math.inf
    assert max_rel_diff({"w": torch.tensor([1.0, 1.0])}, bad) == math.inf
    assert max_rel_diff(bad, bad) == math.inf


def test_equal_zero_empty_and_scalar_tensors() -> None:
    a = {"zero": torch.zeros(3), "empty": torch.zeros(0, 2), "scalar": torch.tensor(2.0)}
    assert max_rel_diff(a, a) == 0.0
    assert difference(a, a).tensor is None
    assert max_rel_diff({"zero": torch.zeros(3)}, {"zero": torch.ones(3)}) == math.inf
    assert max_rel_diff({}, {}) == 0.0


def test_half_precision_is_compared_in_double() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        a = {"w": torch.tensor([256.0, 1.0], dtype=dtype)}
        b = {"w": torch.tensor([258.0, 1.0], dtype=dtype)}
        assert max_rel_diff(a, b) == 2.0 / 256.0


def test_other_names_shapes_or_kinds_are_refused() -> None:
    one = {"w": torch.zeros(2)}
    with pytest.raises(RequestError, match='"extra"'):
        max_rel_diff(one, {"w": torch.zeros(2), "extra": torch.zeros(1)})
    with pytest.raises(RequestError, match='"w" is 2 in one and 2 × 2'):
        max_rel_diff(one, {"w": torch.zeros(2, 2)})
    with pytest.raises(RequestError, match="integers"):
        max_rel_diff(one, {"w": torch.zeros(2, dtype=torch.int64)})


def test_the_checksum_is_that_of_the_bytes_written_by_hand() -> None:
    state = {
        "b.weight": torch.tensor([[1.0, -2.0], [0.5, 3.25]]),
        "a": torch.tensor(7, dtype=torch.int64),
        "half": torch.tensor([1.0, -2.5], dtype=torch.bfloat16),
        "flag": torch.tensor([True, False]),
        "none": torch.zeros(0, 3, dtype=torch.float64),
    }
    # bfloat16 is the upper half of a float32: 1.0 is 0x3F80, -2.5 is 0xC020.
    stream = b"a\0int64\0\0" + struct.pack("<q", 7)
    stream += b"b.weight\0float32\x002,2\0" + struct.pack("<4f", 1.0, -2.0, 0.5, 3.25)
    stream += b"flag\0bool\x002\0" + b"\x01\x00"
    stream += b"half\0bfloat16\x002\0" + b"\x80\x3f\x20\xc0"
    stream += b"none\0float64\x000,3\0"
    assert weights_sha256(state) == hashlib.sha256(stream).hexdigest()


def test_the_checksum_sees_values_not_how_they_lie_in_memory() -> None:
    weight = torch.arange(6.0).reshape(2, 3)
    once = weights_sha256({"w": weight})
    assert weights_sha256({"w": weight.t().contiguous().t()}) == once
    assert weights_sha256({"w": torch.nn.Parameter(weight)}) == once
    assert weights_sha256({"w": weight.t()}) != once
    # Tied names both count, and the order of the mapping does not.
    tied = weights_sha256({"w": weight, "v": weight})
    assert tied != once and tied == weights_sha256({"v": weight.clone(), "w": weight})
