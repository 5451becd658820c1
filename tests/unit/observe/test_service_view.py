"""The live view of a service."""

from __future__ import annotations

import io

from rich.console import Console

from shoal.observe.service_view import ServiceView


def test_rates_are_over_the_seconds_between_two_looks() -> None:
    view = ServiceView("http://x")
    numbers = {"answered": 100, "refused": 0, "rows": 100, "batches": 50, "p50_ms": 1.0, "queued": 3}
    view.table({"odd": numbers}, 10.0)
    table = view.table({"odd": {**numbers, "answered": 300, "refused": 10}}, 12.0)
    text = io.StringIO()
    Console(file=text, width=160).print(table)
    row = next(line for line in text.getvalue().splitlines() if "odd" in line)
    cells = [cell.strip() for cell in row.split("│")[1:-1]]
    assert cells[:3] == ["odd", "100", "5"]
    assert cells[6] == "2.0"


def test_nothing_is_shown_where_there_is_no_terminal() -> None:
    text = io.StringIO()
    with ServiceView("http://x", Console(file=text, force_terminal=False)) as view:
        view.show({"odd": {"answered": 1}})
    assert text.getvalue() == ""
