"""What is checked of messages costs no more than their bytes."""

from __future__ import annotations

import pytest

from shoal.errors import RequestError
from shoal.ps import Adagrad
from shoal.ps.checks import _shape_of_sketch
from shoal.ps.spec import TableSpec


def test_shards_are_compared_with_the_table_before_they_are_counted() -> None:
    spec = TableSpec(width=4, optimizer=Adagrad(lr=0.1), admission=2)
    for shards in ((0, 10**12), (3, 1, 3), (-1, 2)):
        with pytest.raises(RequestError, match="are none of a table"):
            _shape_of_sketch(spec, shards)
    assert _shape_of_sketch(spec, (3, 1)) == (2, 1 << 17) and _shape_of_sketch(spec, ()) == (2, 1 << 22)
