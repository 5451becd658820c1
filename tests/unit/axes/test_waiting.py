"""Who spins, and for how long."""

from __future__ import annotations

from shoal.axes.waiting import Patience


def test_short_waits_are_spun_through_and_long_ones_slept_through() -> None:
    patience = Patience(most_s=500e-6)
    assert patience.spin_s == 500e-6
    for _ in range(20):
        patience.learn(200e-6)
        assert patience.spin_s == 500e-6
    # One long wait is an accident; when they are the rule, nobody spins.
    patience.learn(3600.0)
    assert patience.spin_s == 0.0
    for _ in range(5):
        patience.learn(100e-6)
    assert patience.spin_s == 500e-6
    for _ in range(3):
        patience.learn(2e-3)
    assert patience.spin_s == 0.0
