"""The live view of a data set being answered."""

from __future__ import annotations

import io

from rich.console import Console

from shoal.observe.predict_view import PredictView


def test_the_bar_says_rows_speed_and_time_left() -> None:
    text = io.StringIO()
    with PredictView(Console(file=text, force_terminal=True, width=100)) as view:
        view.show(1500, 6000, 0.25, 750.0, 6.0)
        view.show(1600, None, None, 750.0, None)
    shown = text.getvalue()
    assert "1,500 of 6,000 rows" in shown and "750 rows/s" in shown and "0:06 left" in shown
    assert "1,600 rows" in shown


def test_nothing_is_shown_where_there_is_no_terminal() -> None:
    text = io.StringIO()
    with PredictView(Console(file=text, force_terminal=False)) as view:
        view.show(1, 2, 0.5, 1.0, 1.0)
    assert text.getvalue() == ""
