"""Time is counted once, to the innermost part."""

from __future__ import annotations

import pytest

from shoal.train import spent as module
from shoal.train.spent import MEASURING_S, Spent


def test_parts_count_for_themselves_and_measuring_has_a_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    spent = Spent()
    assert spent.left_s == MEASURING_S and spent.sentence() == "Measuring took 0.0 s (all was remembered)."
    with spent.part("start"):
        now[0] += 4
    with spent.part("trials"):
        now[0] += 1
        with spent.part("rewrites"):
            now[0] += 2
        now[0] += 3
    with pytest.raises(RuntimeError), spent.part("trials"):
        now[0] += 0.5
        raise RuntimeError
    assert spent.as_dict() == {"measuring": 6.5, "start": 4.0, "trials": 4.5, "rewrites": 2.0}
    assert spent.left_s == MEASURING_S - 6.5
    assert spent.sentence() == "Measuring took 6.5 s (trials 4.5 s, rewrites 2.0 s); beside it: start 4.0 s."
    with spent.part("compile"):
        now[0] += 20
    assert spent.left_s == 0.0
