"""When a model gets one replica more, and when one less."""

from __future__ import annotations

import pytest

from shoal.errors import RequestError
from shoal.serve.scaling import Load, ReplicaRange, Scaler


class _Service:
    """A clock, a scaler, and replicas that are there as soon as they are asked for."""

    def __init__(self, least: int = 1, most: int = 4, replicas: int = 1) -> None:
        self.scaler = Scaler(least, most)
        self.replicas = replicas
        self.now = self.busy_s = 0.0
        self.refused = 0
        self.why: list[str] = []

    def run(self, seconds: float, work: float = 0.0, refused: int = 0, late: float = 0.0) -> list[int]:
        """``work``: replicas kept busy; ``refused``: in each half second. Returns how many there were after each change."""
        counts = []
        for _ in range(round(seconds * 2)):
            self.now += 0.5
            self.busy_s += 0.5 * min(work, self.replicas)
            self.refused += refused
            change = self.scaler.decide(self.now, Load(self.refused, self.busy_s, late), self.replicas)
            if change is not None:
                self.replicas += change.by
                self.why.append(change.why)
                counts.append(self.replicas)
        return counts


def test_ranges() -> None:
    assert ReplicaRange.of(None) == ReplicaRange.of("auto") == ReplicaRange(1, None)
    assert ReplicaRange.of(2).fixed and ReplicaRange.of("2") == ReplicaRange(2, 2)
    assert ReplicaRange.of("1-4") == ReplicaRange(1, 4) and not ReplicaRange.of("1-4").fixed
    for text in ("0", "4-1", "-1", "1-", "many", "1.5", ""):
        with pytest.raises(RequestError):
            ReplicaRange.of(text)


def test_refusals_bring_one_at_once() -> None:
    service = _Service()
    assert service.run(10, work=0.5) == []
    assert service.run(1, work=1, refused=3) == [2]
    assert "3 requests" in service.why[0]


def test_busy_or_late_replicas_bring_one_after_a_second() -> None:
    for load in ({"work": 5.0}, {"work": 0.3, "late": 0.8}):
        service = _Service(most=2)
        service.run(2, work=0.3)
        assert service.run(1.0, **load) == []
        assert service.run(20, **load) == [2]


def test_one_after_the_other_up_to_the_most() -> None:
    service = _Service(most=3)
    assert service.run(30, work=9, refused=1) == [2, 3]


def test_one_less_after_a_quiet_while_down_to_the_least() -> None:
    service = _Service(least=2, replicas=4)
    assert service.run(29, work=0.5) == []
    assert service.run(120, work=0.5) == [3, 2]


def test_what_would_be_busy_with_one_less_stays() -> None:
    service = _Service(replicas=2)
    assert service.run(300, work=0.6) == []
    assert service.run(20, work=0.2) + service.run(1, work=1.5) + service.run(25, work=0.2) == []
    assert service.run(10, work=0.2) == [1]


def test_no_swinging_back_and_forth() -> None:
    """The load that one was removed at is far from the one that brings it back."""
    service = _Service(replicas=2)
    assert service.run(40, work=0.45) == [1]
    assert service.run(300, work=0.45) == []


def test_another_gateway_counts_from_nothing() -> None:
    service = _Service(most=2)
    service.run(5, work=0.5, refused=0)
    service.refused, service.busy_s = 50, 0.0
    assert service.run(0.5) == []
