"""From a picture to an input, as a bundle says it."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from shoal.data.pictures import Picture
from shoal.errors import DataError, TargetError
from shoal.serve.pictures import decode, fitted
from shoal.serve.preprocess import Preprocess
from shoal.serve.refusals import Refusal
from shoal.serve.signature import ModelSignature


def _signature(shape: tuple[int, ...], preprocess: Any = None, dtype: str = "FP32") -> ModelSignature:
    return ModelSignature.from_description("m", {
        "inputs": [{"name": "input", "dtype": dtype, "shape": [-1, *shape]}], "preprocess": preprocess,
        "outputs": [{"name": "output", "dtype": "FP32", "shape": [-1, 2]}],
    })  # fmt: skip


def _png(values: np.ndarray) -> bytes:
    raw = io.BytesIO()
    Image.fromarray(values).save(raw, "PNG")
    return raw.getvalue()


def _values(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


def test_scale_mean_and_std() -> None:
    values = _values(4, 6, 3)
    first = values.transpose(2, 0, 1).astype(np.float32)
    found = decode([_png(values)], _signature((3, 4, 6)))
    assert np.array_equal(found[0], first / np.float32(255))
    how = {"kind": "image", "scale": 1.0, "mean": [1, 2, 3], "std": [4, 5, 6]}
    right = (first - np.array([1, 2, 3], np.float32).reshape(3, 1, 1)) / np.array([4, 5, 6], np.float32).reshape(3, 1, 1)
    np.testing.assert_allclose(decode([_png(values)], _signature((3, 4, 6), how))[0], right, rtol=1e-6)
    last = decode([_png(values)], _signature((4, 6, 3), how))[0]
    np.testing.assert_allclose(last, right.transpose(1, 2, 0), rtol=1e-6)
    assert np.array_equal(decode([_png(values)], _signature((4, 6, 3), how, "UINT8"))[0], values)


def test_modes() -> None:
    values = _values(4, 6, 3)
    grey = np.asarray(Image.fromarray(values).convert("L"))
    for shape, mode in (((1, 4, 6), None), ((3, 4, 6), "grey")):
        found = decode([_png(values)], _signature(shape, None if mode is None else {"mode": mode}))[0]
        assert np.array_equal(found, np.broadcast_to(grey / np.float32(255), shape))


def test_sixteen_bits_of_grey_are_scaled_and_not_cut_off() -> None:
    values = np.array([[0, 257, 32_896, 65_535]], np.uint16)
    right = np.array([[0, 1, 128, 255]], np.uint8)
    raw = _png(values)
    assert np.array_equal(decode([raw], _signature((1, 1, 4), dtype="UINT8"))[0, 0], right)
    # In training too.
    assert np.array_equal(Picture(raw, "here").decode((1, 4))[..., 0], right)
    assert np.array_equal(Picture(raw, "here").pixels("L"), right)


def test_sizes() -> None:
    # Left black, right white; cut out of the middle.
    values = np.zeros((40, 80, 3), np.uint8)
    values[:, 40:] = 255
    shorter = decode([_png(values)], _signature((3, 8, 8), {"size": 10}))[0, 0]
    both = decode([_png(values)], _signature((3, 8, 8), {"size": [8, 8]}))[0, 0]
    usual = decode([_png(values)], _signature((3, 8, 8)))[0, 0]
    for found in (shorter, both, usual):
        assert found.shape == (8, 8) and found[:, :3].max() == 0 and found[:, 5:].min() == 1
    quarter = np.zeros((40, 80, 3), np.uint8)
    quarter[:, :20] = 255
    # A quarter of the width is seen only where the aspect is given up.
    assert decode([_png(quarter)], _signature((3, 8, 8), {"size": [8, 8]}))[0, 0, :, 0].min() == 1
    assert decode([_png(quarter)], _signature((3, 8, 8)))[0, 0].max() < 0.2


def test_pictures_are_turned_as_their_exif_says() -> None:
    image = Image.fromarray(_values(4, 6, 3))
    exif = Image.Exif()
    exif[0x0112] = 6
    raw = io.BytesIO()
    image.save(raw, "PNG", exif=exif)
    spec = _signature((6, 4, 3), dtype="UINT8").inputs[0]
    assert np.array_equal(fitted(Image.open(raw), spec), np.asarray(image.rotate(-90, expand=True)))


def test_too_many_pixels_in_all() -> None:
    raw = _png(np.zeros((5000, 5000), np.uint8))
    with pytest.raises(Refusal, match="too many pixels") as refused:
        decode([raw] * 3, _signature((1, 8, 8)))
    assert refused.value.status == 413


def test_a_thin_picture_does_not_grow_to_gigabytes() -> None:
    raw, signature = _png(np.zeros((1, 40_000), np.uint8)), _signature((1, 64, 64), {"size": 64})
    with pytest.raises(Refusal, match="long and thin") as refused:
        decode([raw], signature)
    assert refused.value.status == 413
    with pytest.raises(DataError, match="cannot be decoded"):
        Picture(raw, "here").opened(lambda image: fitted(image, signature.inputs[0]))


@pytest.mark.parametrize(
    "wrong",
    [[1], {"std": 0}, {"mean": "a"}, {"mean": [1, 2]}, {"scale": 0}, {"size": 4}, {"size": [8, 8, 8]}, {"size": 1.5},
     {"mode": "CMYK"}, {"kind": "sound"}, {"crop": 3}, {"mean": float("nan")}],
)  # fmt: skip
def test_what_cannot_be_followed_is_refused_when_the_model_is_loaded(wrong: Any) -> None:
    with pytest.raises(TargetError, match=r"m cannot be served: .*preprocess.*\.$"):
        _signature((3, 8, 8), wrong)


def test_grey_models_have_no_colours() -> None:
    with pytest.raises(TargetError, match="one channel"):
        _signature((1, 8, 8), {"mode": "RGB"})
    assert Preprocess.read(None) is None
    assert Preprocess.read({"mean": 0.5}) == Preprocess(mean=(0.5,))
