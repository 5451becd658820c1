"""What is checked of messages costs no more than their bytes."""

from __future__ import annotations

import pytest

from shoal.errors import RequestError
from shoal.ps import Adagrad
from shoal.ps.checks import _sketch_shape
from shoal.ps.spec import TableSpec
from shoal.ps.table import Table


def test_shards_are_compared_with_the_table_before_they_are_counted() -> None:
    table = Table.create(TableSpec(width=4, optimizer=Adagrad(lr=0.1), admission=2))
    for shards in ((0, 10**12), (3, 1), (0, 2)):
        with pytest.raises(RequestError, match="do not lie side by side"):
            _sketch_shape(table, shards)
    assert _sketch_shape(table, (0, 1)) is not None
