"""Who spins, and for how long."""

from __future__ import annotations

from shoal.axes.waiting import Spinning


def test_short_waits_are_spun_through_and_long_ones_slept_through() -> None:
    spinning = Spinning(most_s=500e-6)
    assert spinning.spin_s == 500e-6
    for _ in range(20):
        spinning.learn(200e-6)
        assert spinning.spin_s == 500e-6
    # One long wait is an accident; when they are the rule, nobody spins.
    spinning.learn(3600.0)
    assert spinning.spin_s == 0.0
    for _ in range(5):
        spinning.learn(100e-6)
    assert spinning.spin_s == 500e-6
    for _ in range(3):
        spinning.learn(2e-3)
    assert spinning.spin_s == 0.0
