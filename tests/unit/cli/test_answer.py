from __future__ import annotations

from shoal.cli.answer import table


def test_columns_are_aligned_numbers_to_the_right() -> None:
    assert table([("a", 5, "x"), ("long", 100, "")], ("name", "n", "rest")) == [
        "name    n  rest",
        "a       5  x",
        "long  100",
    ]


def test_no_rows_no_table() -> None:
    assert table([], ("name",)) == []
