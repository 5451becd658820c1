"""The live view of a service."""

from __future__ import annotations

import io

from rich.console import Console

from shoal.observe.service_view import ServiceView

_NUMBERS = {"answered": 100, "refused": 0, "rows": 100, "batches": 50, "p50_ms": 1.0, "queued": 3, "replicas": 2}


def _shown(view: ServiceView, numbers: dict[str, dict[str, float]], now_s: float, width: int = 160) -> list[list[str]]:
    text = io.StringIO()
    Console(file=text, width=width).print(view.table(numbers, now_s))
    return [line.split() for line in text.getvalue().splitlines()]


def test_rates_are_over_the_seconds_between_two_looks() -> None:
    view = ServiceView("http://x", Console(file=io.StringIO(), width=110))
    assert ["odd", "–", "–", "1.0", "0.0", "0.0", "–", "3", "0", "2", "0", "0"] in _shown(view, {"odd": _NUMBERS}, 10.0)
    later = {**_NUMBERS, "answered": 300, "refused": 10, "rows": 160, "batches": 70}
    assert ["odd", "100", "5", "1.0", "0.0", "0.0", "3.0", "3", "0", "2", "0", "0"] in _shown(view, {"odd": later}, 12.0)
    # A new gateway counts batches from the beginning.
    again = {**later, "rows": 2, "batches": 1, "answered": 302}
    assert ["odd", "1", "0", "1.0", "0.0", "0.0", "–", "3", "0", "2", "0", "0"] in _shown(view, {"odd": again}, 14.0)


def test_a_narrow_terminal_leaves_out_what_matters_least_and_a_wide_one_shows_the_last_rates() -> None:
    view = ServiceView("http://x", Console(file=io.StringIO(), width=80))
    lines = _shown(view, {"[odd]": _NUMBERS}, 10.0, 80)
    assert ["model", "answers/s", "refused/s", "p95", "ms", "p99", "ms", "batch", "queue", "replicas"] in lines
    assert any(line[:1] == ["[odd]"] for line in lines)
    wide = ServiceView("http://x", Console(file=io.StringIO(), width=140))
    for step in range(4):
        lines = _shown(wide, {"odd": {**_NUMBERS, "answered": 100 + 10 * step * step}}, float(step))
    assert any("▂▅█" in line for line in lines)


def test_nothing_is_shown_where_there_is_no_terminal() -> None:
    text = io.StringIO()
    with ServiceView("http://x", Console(file=text, force_terminal=False)) as view:
        view.show({"odd": {"answered": 1}})
    assert text.getvalue() == ""
