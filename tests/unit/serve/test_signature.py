"""What goes in and out of a served model."""

from __future__ import annotations

import numpy as np
import pytest

from shoal.errors import TargetError
from shoal.serve.signature import DTYPES, ModelSignature, TensorSignature

_DESCRIPTION = {
    "inputs": [{"name": "x", "dtype": "BF16", "shape": [-1, 3]}],
    "outputs": [{"name": "y", "dtype": "INT64", "shape": [-1]}],
    "labels": ["cat", "dog"],
}


def test_from_a_bundles_description() -> None:
    signature = ModelSignature.from_description("m", _DESCRIPTION)
    assert signature.inputs == (TensorSignature("x", "BF16", (-1, 3)),)
    assert signature.labels == ("cat", "dog")
    assert signature.metadata() == {
        "name": "m",
        "versions": ["1"],
        "platform": "shoal_pytorch",
        "inputs": [{"name": "x", "datatype": "BF16", "shape": [-1, 3]}],
        "outputs": [{"name": "y", "datatype": "INT64", "shape": [-1]}],
    }


@pytest.mark.parametrize("datatype", DTYPES)
def test_bytes_of_a_row(datatype: str) -> None:
    tensor = TensorSignature("x", datatype, (-1, 4, 5))
    assert tensor.row_bytes == 20 * np.empty(1, tensor.dtype).nbytes
    assert TensorSignature("x", datatype, (-1, -1)).row_bytes is None
    assert TensorSignature("x", datatype, (-1,)).row_bytes == tensor.dtype.itemsize


@pytest.mark.parametrize("entry", [{"name": "x", "dtype": "FP32"}, {"name": "x", "dtype": "FP128", "shape": [-1]}, {}])
def test_bad_descriptions(entry: dict[str, object]) -> None:
    with pytest.raises(TargetError):
        ModelSignature.from_description("m", {"inputs": [entry], "outputs": []})
