"""Who gets the next request, on a clock of our own."""

from __future__ import annotations

import random

import pytest

from shoal.serve.route.balance import Ask, Balancer, Ended

_ASK = Ask(model="m", size=2000)


def _balancer(count: int = 3) -> Balancer:
    balancer = Balancer([f"http://host:{k}" for k in range(count)])
    for k in range(count):
        balancer.health(k, None)
    return balancer


class _World:
    """Services that each answer one request after the other, each in its own time; requests come at random."""

    def __init__(self, balancer: Balancer, takes_s: list[float]) -> None:
        self.balancer, self.takes_s = balancer, takes_s
        self.now = 0.0
        self.free_at = [0.0] * len(takes_s)
        self.due: list[tuple[float, int, int]] = []
        self.chosen = [0] * len(takes_s)
        self.random = random.Random(1)

    def run(self, seconds: float, rate: float) -> list[int]:
        """Shares of the requests that were asked in so many seconds."""
        self.chosen = [0] * len(self.takes_s)
        until = self.now + seconds
        while self.now < until:
            self.now += self.random.expovariate(rate)
            for due, index, number in sorted(self.due):
                if due <= self.now:
                    self.due.remove((due, index, number))
                    self.balancer.end(index, number, _ASK, Ended.ANSWERED, due)
            index = self.balancer.choose(_ASK, self.now)
            assert index is not None
            self.chosen[index] += 1
            self.free_at[index] = max(self.free_at[index], self.now) + self.takes_s[index]
            self.due.append((self.free_at[index], index, self.balancer.begin(index, _ASK, self.now)))
        return self.chosen


def test_equal_services_get_equal_shares_and_a_slow_one_less() -> None:
    world = _World(_balancer(), [0.01, 0.01, 0.01])
    shares = world.run(20, rate=150)
    assert max(shares) < 1.3 * min(shares)
    world.takes_s[1] = 0.1
    world.run(5, rate=150)
    shares = world.run(20, rate=150)
    assert shares[1] < 0.15 * min(shares[0], shares[2])
    # Nothing piles up: what was slow has no more than what it can do.
    assert len(world.due) < 20
    world.takes_s[1] = 0.01
    world.run(30, rate=150)
    assert world.run(20, rate=150)[1] > 0.6 * max(world.chosen)


def test_what_hangs_gets_nothing_more_before_anybody_says_so() -> None:
    world = _World(_balancer(), [0.01, 0.01, 0.01])
    world.run(5, rate=100)
    world.takes_s[0] = 1e9
    assert world.run(5, rate=100)[0] <= 3
    world.balancer.health(0, "it does not answer within 1 s")
    assert world.run(5, rate=100)[0] == 0


def test_sizes_and_models_are_learned_apart() -> None:
    balancer = _balancer(2)
    small, large = Ask(model="m", size=100), Ask(model="m", size=1 << 20)
    for step in range(20):
        for index, (ask, took_s) in ((0, (small, 0.001)), (0, (large, 0.2)), (1, (small, 0.002)), (1, (large, 0.1))):
            number = balancer.begin(index, ask, float(step))
            balancer.end(index, number, ask, Ended.ANSWERED, step + took_s)
    assert balancer.choose(small, 20.0) == 0 and balancer.choose(large, 20.0) == 1


def test_refusals_lower_the_share_as_long_as_retry_after_says_and_are_no_fault() -> None:
    balancer = _balancer(2)
    for step in range(20):
        now = step / 100
        for index in (0, 1):
            number = balancer.begin(index, _ASK, now)
            refused = index == 0 and step >= 10
            balancer.end(index, number, _ASK, Ended.REFUSED if refused else Ended.ANSWERED, now + 0.01, 2.0)
    assert balancer.choose(_ASK, 0.3) == 1
    assert balancer.predict(0, _ASK, 0.3) > 5 * balancer.predict(1, _ASK, 0.3)
    assert balancer.predict(0, _ASK, 15.0) < 1.1 * balancer.predict(1, _ASK, 15.0)
    assert balancer.upstreams[0].breaker.state(0.3) == "closed"


@pytest.mark.parametrize("ended", [Ended.REJECTED, Ended.REFUSED, Ended.LATE, Ended.DROPPED])
def test_only_faults_trip_a_breaker(ended: Ended) -> None:
    balancer = _balancer(1)
    for step in range(100):
        balancer.end(0, balancer.begin(0, _ASK, step), _ASK, ended, step + 0.01)
    assert balancer.choose(_ASK, 100.0) == 0
    for _ in range(5):
        assert balancer.choose(_ASK, 100.0) == 0
        balancer.end(0, balancer.begin(0, _ASK, 100.0), _ASK, Ended.FAULT, 100.0)
    assert balancer.choose(_ASK, 100.1) is None
    # Half open: one goes through, and its fault keeps others out for twice as long.
    assert balancer.choose(_ASK, 100.6) == 0
    number = balancer.begin(0, _ASK, 100.6)
    assert balancer.choose(_ASK, 100.6) is None
    balancer.end(0, number, _ASK, Ended.FAULT, 100.6)
    assert balancer.choose(_ASK, 101.5) is None and balancer.choose(_ASK, 101.7) == 0
    balancer.end(0, balancer.begin(0, _ASK, 101.7), _ASK, Ended.ANSWERED, 101.8)
    assert balancer.upstreams[0].breaker.state(101.8) == "closed"


def test_what_a_client_gave_up_makes_nobody_quicker() -> None:
    balancer = _balancer(2)
    for step in range(20):
        for index, took_s in ((0, 0.2), (1, 0.3)):
            balancer.end(index, balancer.begin(index, _ASK, step), _ASK, Ended.ANSWERED, step + took_s)
    for step in range(20, 40):
        # Its clients wait for 50 ms, and it would have taken 300.
        balancer.end(1, balancer.begin(1, _ASK, step), _ASK, Ended.LATE, step + 0.05)
    assert balancer.predict(1, _ASK, 40.0) > 0.25 and balancer.choose(_ASK, 40.0) == 0


def test_keys_stay_where_they_are_and_loads_are_bounded() -> None:
    balancer = _balancer()
    keys = [f"user-{k}" for k in range(300)]
    home = {key: balancer.choose(Ask(model="m", affinity=key), 0.0) for key in keys}
    assert min(list(home.values()).count(k) for k in range(3)) > 60
    balancer.health(1, "gone")
    moved = {key: balancer.choose(Ask(model="m", affinity=key), 0.0) for key in keys}
    assert all(moved[key] == home[key] for key in keys if home[key] != 1) and 1 not in moved.values()
    balancer.health(1, None)
    loads = [0, 0, 0]
    for _ in range(90):
        index = balancer.choose(Ask(model="m", affinity="popular"), 0.0)
        assert index is not None
        balancer.begin(index, _ASK, 0.0)
        loads[index] += 1
    assert max(loads) <= 1.25 * 30 + 1


def test_who_lacks_a_model_is_not_asked_for_it_and_tried_ones_are_left_out() -> None:
    balancer = _balancer()
    balancer.lacks(0, "m", 0.0)
    assert {balancer.choose(_ASK, 0.0, tried) for tried in ((), (1,), (2,))} <= {1, 2}
    assert balancer.choose(_ASK, 0.0, (1, 2)) is None
    assert balancer.choose(Ask(model="other"), 0.0, (1, 2)) == 0 and balancer.choose(_ASK, 11.0, (1, 2)) == 0
    balancer.health(1, "it is away")
    balancer.health(2, "it is away")
    # Those may have it.
    assert balancer.choose(_ASK, 0.0) is None
    balancer.lacks(1, "m", 0.0)
    balancer.lacks(2, "m", 0.0)
    assert balancer.choose(_ASK, 0.0) == 0 and balancer.choose(_ASK, 0.0, (1,)) is None


def test_refusals_are_asked_about_again_for_a_share_of_requests_only() -> None:
    balancer = _balancer()
    asked = 0
    for _ in range(1000):
        balancer.count_request()
        asked += balancer.may_ask_again(Ended.REFUSED)
    assert 200 <= asked <= 225
    assert balancer.may_ask_again(Ended.FAULT) and not balancer.may_ask_again(Ended.REJECTED)


def test_one_unlucky_answer_is_soon_forgotten() -> None:
    world = _World(_balancer(2), [0.2, 0.01])
    world.run(0.2, rate=50)
    world.takes_s[0] = 0.01
    world.run(10, rate=50)
    assert world.run(10, rate=50)[0] > 0.7 * world.chosen[1]
