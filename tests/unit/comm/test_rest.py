from __future__ import annotations

from types import SimpleNamespace

import pytest

from shoal.comm import rest


def test_the_core_is_given_up_first_and_only_who_waits_long_sleeps(monkeypatch: pytest.MonkeyPatch) -> None:
    """A nap takes many times as long as what is waited for mostly does."""
    now, yields, naps = [10.0], [], []
    monkeypatch.setattr(rest, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=naps.append))
    monkeypatch.setattr(rest, "os", SimpleNamespace(sched_yield=lambda: yields.append(now[0])))
    rests = rest.Rests()
    for later in (0.0, 0.0001, 0.00019, 0.0003, 0.1):
        now[0] = 10.0 + later
        rests.rest()
    assert len(yields) == 3 and naps == [50e-6, 50e-6]
