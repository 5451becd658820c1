"""Admission and order, with a clock and a server that are numbers."""

from __future__ import annotations

import heapq
import random
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from shoal.serve.dispatch import Dispatcher, Row
from shoal.serve.latency import LatencyModel

# One row takes 10 ms; 8 rows take 20: batches pay.
PAYS = {1: 0.010, 2: 0.011, 4: 0.014, 8: 0.020}
# Batches take as long as their rows one by one.
DOES_NOT = {1: 0.001, 2: 0.002, 4: 0.004, 8: 0.008}


def _dispatcher(measured: dict[int, float] = PAYS, replicas: int = 1, capacity: int = 64) -> Dispatcher:
    return Dispatcher(LatencyModel.from_measured(measured), capacity, replicas)


def _put(
    dispatcher: Dispatcher, request: int, deadline_s: float, rows: int = 1, priority: int = 0, key: str = ""
) -> None:
    assert dispatcher.admit(rows, deadline_s, priority, 0.0) is None
    dispatcher.put([Row(100 * request + k, request, deadline_s, priority, key) for k in range(rows)], 0.0)


class TestOrder:
    def test_priority_then_deadline(self) -> None:
        dispatcher = _dispatcher(DOES_NOT)
        for request, (deadline, priority) in enumerate([(3.0, 0), (1.0, 0), (9.0, 5), (2.0, 0)]):
            _put(dispatcher, request, deadline, priority=priority)
        assert [dispatcher.take(0.0)[0].request for _ in range(4)] == [2, 1, 3, 0]
        assert dispatcher.take(0.0) == []

    def test_unequal_keys_never_share_a_batch(self) -> None:
        dispatcher = _dispatcher()
        for request in range(6):
            _put(dispatcher, request, 1.0 + request, key="ab"[request % 2])
        assert [row.request for row in dispatcher.take(0.0)] == [0, 2, 4]
        assert [row.request for row in dispatcher.take(0.0)] == [1, 3, 5]

    def test_what_comes_back_is_first_again(self) -> None:
        dispatcher = _dispatcher(DOES_NOT)
        for request in range(3):
            _put(dispatcher, request, 1.0 + request)
        taken = dispatcher.take(0.0)
        dispatcher.give_back(taken)
        assert dispatcher.in_flight == 0 and dispatcher.queued == 3
        assert dispatcher.take(0.0) == taken


class TestBatches:
    def test_size_is_where_rows_are_cheapest(self) -> None:
        dispatcher = _dispatcher()
        _put(dispatcher, 1, 10.0, rows=20)
        assert len(dispatcher.take(0.0)) == 8
        assert dispatcher.statistics()["batching"]

    def test_no_batch_where_none_pays_and_it_says_so(self) -> None:
        dispatcher = _dispatcher(DOES_NOT)
        _put(dispatcher, 1, 10.0, rows=20)
        assert len(dispatcher.take(0.0)) == 1
        statistics = dispatcher.statistics()
        assert not statistics["batching"] and statistics["batch_limit"] == 1
        assert "5%" in statistics["why"] and "1 ms" in statistics["why"]

    def test_smaller_where_a_deadline_would_be_missed(self) -> None:
        dispatcher = _dispatcher()
        _put(dispatcher, 1, 0.0125)
        _put(dispatcher, 2, 10.0, rows=7)
        assert [row.request for row in dispatcher.take(0.0)] == [1, 2]


class TestAdmission:
    def test_says_when_to_come_again(self) -> None:
        dispatcher = _dispatcher(DOES_NOT)
        _put(dispatcher, 1, 1.0, rows=30)
        assert dispatcher.admit(1, 0.0312, 0, 0.0) is None
        later = dispatcher.admit(1, 0.0212, 0, 0.0)
        assert later is not None and 0.009 < later < 0.0121

    def test_higher_priority_goes_ahead(self) -> None:
        dispatcher = _dispatcher(DOES_NOT)
        _put(dispatcher, 1, 1.0, rows=30)
        assert dispatcher.admit(1, 0.005, 0, 0.0) is not None
        assert dispatcher.admit(1, 0.005, 1, 0.0) is None

    def test_nobody_and_no_room(self) -> None:
        assert _dispatcher(replicas=0).admit(1, 100.0, 0, 0.0) is not None
        full = _dispatcher(DOES_NOT, capacity=10)
        _put(full, 1, 100.0, rows=10)
        assert full.admit(1, 100.0, 0, 0.0) is not None
        full.take(0.0)
        assert full.admit(1, 100.0, 0, 0.0) is not None


class TestLeaving:
    def test_too_late_for_a_batch_of_its_own_is_too_late(self) -> None:
        dispatcher = _dispatcher()
        _put(dispatcher, 1, 0.050, rows=3)
        _put(dispatcher, 2, 10.0)
        assert dispatcher.expired(0.039) == []
        assert {row.slot for row in dispatcher.expired(0.041)} == {100, 101, 102}
        assert dispatcher.queued == 1 and dispatcher.expired(0.041) == []

    def test_cancel(self) -> None:
        dispatcher = _dispatcher()
        _put(dispatcher, 1, 1.0, rows=2)
        _put(dispatcher, 2, 2.0)
        assert len(dispatcher.cancel(1)) == 2 and dispatcher.cancel(1) == []
        assert [row.request for row in dispatcher.take(0.0)] == [2]


@given(st.lists(st.tuples(st.sampled_from("patecg"), st.integers(0, 5), st.integers(1, 4)), max_size=60))
def test_each_row_comes_out_once(steps: list[tuple[str, int, int]]) -> None:
    """Whatever is done in whatever order, a row that was put leaves exactly once."""
    dispatcher = _dispatcher(capacity=10_000)
    put: Counter[int] = Counter()
    out: Counter[int] = Counter()
    flying: list[list[Row]] = []
    now, request = 0.0, 0
    for step, number, count in steps:
        if step in "pa":
            request += 1
            rows = [
                Row(1000 * request + k, request, now + 0.1 * (number + 1), number, number % 2) for k in range(count)
            ]
            if dispatcher.admit(count, rows[0].deadline_s, number, now) is None:
                dispatcher.put(rows, now)
                put.update(row.slot for row in rows)
        elif step == "t" and (batch := dispatcher.take(now)):
            flying.append(batch)
        elif step == "e":
            now += 0.02 * count
            out.update(row.slot for row in dispatcher.expired(now))
        elif step == "c":
            out.update(row.slot for row in dispatcher.cancel(max(1, request - number)))
        elif step == "g" and flying:
            dispatcher.give_back(flying.pop(0))
    for batch in flying:
        dispatcher.finished(batch, 0.01, now)
        out.update(row.slot for row in batch)
    while batch := dispatcher.take(now):
        dispatcher.finished(batch, 0.01, now)
        out.update(row.slot for row in batch)
    assert out == put
    assert dispatcher.queued == dispatcher.in_flight == 0


def _simulate(load: float, slo_s: float, actual: float, seconds: float = 30.0) -> tuple[int, int, int]:
    """(arrived, in time, late) of a Poisson stream at ``load`` × capacity; a batch takes ``actual`` × what was measured."""
    model = LatencyModel.from_measured(PAYS)
    dispatcher = Dispatcher(LatencyModel.from_measured(PAYS), 10_000, 2)
    rate = load * 2 * model.rows_per_s(8) / actual
    draw = random.Random(3)
    events: list[tuple[float, int, str, list[Row]]] = []
    arrived = good = late = order = 0
    at = 0.0
    while (at := at + draw.expovariate(rate)) < seconds:
        events.append((at, (order := order + 1), "arrive", []))
    heapq.heapify(events)
    idle = 2
    while events:
        now, _, kind, rows = heapq.heappop(events)
        late += len(dispatcher.expired(now))
        if kind == "arrive":
            arrived += 1
            if dispatcher.admit(1, now + slo_s, 0, now) is None:
                dispatcher.put([Row(0, arrived, now + slo_s, 0, "")], now)
        else:
            idle += 1
            dispatcher.finished(rows, actual * model.predict(len(rows)), now)
            good += sum(now <= row.deadline_s for row in rows)
            late += sum(now > row.deadline_s for row in rows)
        while idle and (batch := dispatcher.take(now)):
            idle -= 1
            heapq.heappush(events, (now + actual * model.predict(len(batch)), (order := order + 1), "done", batch))
    return arrived, good, late


def test_three_times_too_much_load_keeps_its_promises() -> None:
    arrived, good, late = _simulate(load=3.0, slo_s=0.15, actual=1.0)
    assert good >= 0.9 * arrived / 3
    assert late <= 0.05 * (good + late)


def test_machine_that_is_slower_than_measured_is_learned() -> None:
    arrived, good, late = _simulate(load=3.0, slo_s=0.3, actual=2.0)
    assert good >= 0.85 * arrived / 3
    assert late <= 0.1 * (good + late)


def test_light_load_is_let_in() -> None:
    arrived, good, late = _simulate(load=0.3, slo_s=0.15, actual=1.0)
    assert good >= 0.99 * arrived and late == 0


def test_a_bad_moment_is_forgotten() -> None:
    """Everything was late for a while: what is let in afterwards, one at a time if need be, teaches that it is over."""
    dispatcher = _dispatcher(DOES_NOT)
    now = 0.0
    for request in range(2000):
        if dispatcher.admit(1, now + 0.05, 0, now) is None:
            dispatcher.put([Row(0, request, now + 0.05, 0, None)], now)
            now += 0.2
            dispatcher.finished(dispatcher.take(now), 0.001, now)
    assert dispatcher.statistics()["margin_ms"] > 50.0
    admitted = 0
    for request in range(2000, 12_000):
        now += 0.002
        for k in range(2):
            if dispatcher.admit(1, now + 0.05, 0, now) is None:
                admitted += 1
                dispatcher.put([Row(0, 2 * request + k, now + 0.05, 0, None)], now)
        while rows := dispatcher.take(now):
            dispatcher.finished(rows, 0.001, now + 0.001)
    assert dispatcher.statistics()["margin_ms"] < 5.0 and admitted > 15_000
