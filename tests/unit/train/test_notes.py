"""What goes into a checkpoint beside tensors comes out as it was, and what would not is refused."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from shoal.errors import JobError, RequestError
from shoal.train import notes


class Own:
    """A class of the user's own."""


def test_values_come_back_with_their_types(tmp_path: Path) -> None:
    kept: dict[str, Any] = {
        "plain": [1, 2.5, "x", None, True, (1, 2), {3: 4}, Counter({4: 2})],
        "numpy": [np.float64(0.1), np.float32(0.1), np.int64(7), np.bool_(True), np.arange(6.0).reshape(2, 3)],
        "tensors": [torch.arange(3), torch.ones(2, 2, dtype=torch.bfloat16)],
    }
    path = tmp_path / "notes.pt"
    path.write_bytes(notes.to_bytes(kept))
    found = notes.read(path)
    assert found["plain"] == kept["plain"]
    for one, other in zip(found["numpy"], kept["numpy"], strict=True):
        assert type(one) is type(other) and one.dtype == other.dtype and np.array_equal(one, other)
    for one, other in zip(found["tensors"], kept["tensors"], strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


@pytest.mark.parametrize(
    ("value", "named"),
    [(Own(), r"a \S*Own"), (lambda: 0, "something that cannot be pickled"), (Path("x"), r"a \S*Path")],
)
def test_what_could_not_be_read_again_is_refused(value: Any, named: str) -> None:
    with pytest.raises(
        JobError, match=f"keeps {named}.*, which a checkpoint cannot hold; let it keep numbers"
    ) as caught:
        notes.to_bytes({"scheduler": {"best": value}})
    assert "\n" not in str(caught.value)


def test_a_file_that_holds_something_else(tmp_path: Path) -> None:
    torch.save({"x": Own()}, tmp_path / "notes.pt")
    with pytest.raises(RequestError, match=r"notes\.pt cannot be read .*; begin another run\.$"):
        notes.read(tmp_path / "notes.pt")
