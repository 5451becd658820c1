"""One model's desk over real slots and rings; what a replica does to them is done by hand."""

from __future__ import annotations

import asyncio
import gc
import os
import time
import weakref
from typing import Any

import numpy as np
import pytest

from shoal.serve.catalogue import Catalogue
from shoal.serve.common import Common
from shoal.serve.desk import Desk
from shoal.serve.direct import Direct
from shoal.serve.guard import Bodies
from shoal.serve.messages import AddModel, Limits
from shoal.serve.metrics import Metrics
from shoal.serve.pace import Pace
from shoal.serve.protocols.v2 import USUAL_PRIORITY, InferRequest
from shoal.serve.refusals import Refusal
from shoal.serve.shelf import Shelf
from shoal.serve.signature import ModelSignature
from shoal.serve.slots import Outcome, SlotLayout, Slots

_SLOTS = 8


class _Model:
    """Doubles rows; raises over a batch with a negative number in it."""

    def __init__(self) -> None:
        tensor = {"dtype": "FP32", "shape": [-1, 1]}
        signature = ModelSignature.from_description(
            "m", {"inputs": [{"name": "input", **tensor}], "outputs": [{"name": "output", **tensor}]}
        )
        layout = SlotLayout.of(signature, _SLOTS, rings=1, max_batch=4)
        self.slots = Slots.create(layout)
        self.batches: list[list[float]] = []
        self._done = os.eventfd(0, os.EFD_NONBLOCK)
        # A batch of four takes no longer than one row.
        measured_s = {1: 0.01, 2: 0.01, 4: 0.01}
        self._model = AddModel(signature=signature, layout=layout, measured_s=measured_s, why="", sample=(), expected=())
        self.answers: dict[float, Any] = {}
        self.begin()

    def begin(self) -> None:
        """A gateway begins, or another takes the place of a dead one."""
        self.desk = Desk(self._model, os.dup(self.slots.fd), self._done)
        self.come()

    def come(self) -> None:
        """A replica begins, or another takes the place of a dead one."""
        self.wake = os.eventfd(0, os.EFD_SEMAPHORE | os.EFD_NONBLOCK)
        self.desk.replica_up(0, self.wake)

    def woken(self) -> int:
        """How often the replica has been woken and has not looked yet."""
        for count in range(100):
            try:
                os.eventfd_read(self.wake)
            except BlockingIOError:
                return count
        raise AssertionError("it is woken for ever")

    def ask(self, *values: float) -> None:
        """A request with a row for each of these."""
        rows = np.array(values, np.float32).reshape(-1, 1)
        request = InferRequest("", (rows,), len(rows), (), 60.0, USUAL_PRIORITY)

        def done(outputs: list[np.ndarray] | None, refusal: Refusal | None) -> None:
            assert values[0] not in self.answers
            self.answers[values[0]] = refusal.sentence if outputs is None and refusal is not None else outputs

        self.desk.submit(request, 60.0, lambda: False, time.monotonic(), done)

    def compute(self, update: int = 0) -> None:
        """Until nothing is handed out any more. ``update``: of the weights, the first batch's; the next one's is larger."""
        ring = self.slots.rings[0]
        while ring.done < ring.posted:
            rows = ring.slots_of(ring.done)
            given = self.slots.inputs[0][rows]
            self.batches.append(sorted(given.ravel().tolist()))
            self.slots.outputs[0][rows] = 2 * given
            ring.finish(0.01, "The model raised ValueError." if (given < 0).any() else None, update)
            update += update > 0
            self.desk.collect()

    def settled(self) -> bool:
        """Whether nothing is left of any request, and each had one outcome."""
        assert self.slots.open_requests() == 0 and self.slots.counts[Outcome.ACCEPTED] == len(self.answers)
        return (self.desk.open_requests, self.desk.dispatcher.in_flight, self.desk.dispatcher.queued) == (0, 0, 0) and len(
            self.desk._free
        ) == _SLOTS


@pytest.fixture
def model() -> _Model:
    return _Model()


def test_a_row_that_the_model_cannot_take_fails_alone(model: _Model) -> None:
    for value in (1.0, 2.0, -3.0, 4.0):
        model.ask(value)
    model.ask(5.0, -6.0)
    model.compute()
    assert max(map(len, model.batches)) > 1, "they were to be computed together"
    assert {value: model.answers[value][0].item() for value in (1.0, 2.0, 4.0)} == {1.0: 2.0, 2.0: 4.0, 4.0: 8.0}
    assert model.answers[-3.0] == model.answers[5.0] == "The model raised ValueError."
    assert model.slots.counts[Outcome.ANSWERED] == 3 and model.slots.counts[Outcome.FAILED] == 2 and model.settled()


def test_an_answer_says_the_oldest_update_that_its_rows_were_computed_with(model: _Model) -> None:
    # The first one's rows are computed in several batches.
    model.ask(*range(1, 6))
    model.ask(7.0)
    model.compute(update=41)
    assert len(model.batches) > 1 and model.answers[1].update == 41 and model.answers[7.0].update > 41
    model.ask(8.0)
    model.compute()
    assert model.answers[8.0].update == 0 and model.settled()


async def _probe(model: _Model) -> None:
    request = InferRequest("", (np.ones((1, 1), np.float32),), 1, (), 60.0, 0, uncached=True, own=True)
    asked = asyncio.create_task(model.desk.infer(request, 60.0))
    await asyncio.sleep(0)
    model.compute()
    assert (await asked)[0].item() == 2.0


def test_what_the_service_asks_itself_is_counted_apart(model: _Model) -> None:
    asyncio.run(_probe(model))
    numbers = model.desk.numbers()
    assert numbers["probed"] == 1 and numbers["rows"] == numbers["batches"] == numbers["accepted"] == numbers["answered"] == 0
    assert model.desk.times.requests == 0 and not model.desk.times.latest_s and model.desk.last_answer_s > 0
    model.ask(3.0)
    model.compute()
    numbers = model.desk.numbers()
    assert (numbers["probed"], numbers["rows"], numbers["answered"]) == (1, 1, 1) and model.settled()


def test_a_row_over_which_replicas_die_fails_alone(model: _Model) -> None:
    for value in (11.0, 12.0, 13.0, 14.0):
        model.ask(value)
    ring = model.slots.rings[0]
    for _ in range(10):
        while ring.done < ring.posted:
            rows = ring.slots_of(ring.done)
            given = model.slots.inputs[0][rows]
            if (given == 13.0).any():
                break
            model.slots.outputs[0][rows] = 2 * given
            ring.finish(0.01)
            model.desk.collect()
        if ring.done < ring.posted:
            model.desk.replica_down(0)
            model.come()
    assert {value: model.answers[value][0].item() for value in (11.0, 12.0, 14.0)} == {11.0: 22.0, 12.0: 24.0, 14.0: 28.0}
    assert "died each time" in model.answers[13.0] and model.settled()


def test_what_was_ended_while_a_dead_replica_had_it_leaves_nothing_behind(model: _Model) -> None:
    model.ask(1.0, 2.0)
    (ticket,) = model.desk._tickets.values()
    model.desk._end(ticket, Outcome.EXPIRED, Refusal(504, "Late."))
    model.desk.replica_down(0)
    assert model.answers[1.0] == "Late." and model.settled()


def test_a_replica_is_woken_for_what_a_gateway_gave_it_that_died_before_it_had_woken_it(model: _Model) -> None:
    # By the gateway that was there before.
    model.slots.rings[0].post([3])
    model.begin()
    model.ask(1.0)
    assert model.woken() >= model.slots.rings[0].posted - model.slots.rings[0].done == 1
    model.compute()
    assert model.answers[1.0][0].item() == 2.0 and model.settled()


def test_a_request_leaves_nothing_for_the_garbage_collector(model: _Model) -> None:
    gc.collect()
    gc.disable()
    try:
        left = []
        for value in (1.0, -2.0):
            model.ask(value)
            (ticket,) = model.desk._tickets.values()
            left.append(weakref.ref(ticket.future))
            del ticket
            model.compute()
        assert [reference() for reference in left] == [None, None], "collecting 50,000 of them stops the loop for 25 ms"
    finally:
        gc.enable()
    assert model.answers[1.0][0].item() == 2.0 and model.answers[-2.0] == "The model raised ValueError."


class _Asker:
    keep_alive = True
    answered: bytes | Refusal | None = None

    def gone(self) -> bool:
        return False

    def answer(self, answered: bytes | Refusal) -> None:
        assert self.answered is None
        self.answered = answered


def _direct(model: _Model, slo_s: float) -> tuple[Direct, Shelf]:
    """The shortest way to a model that answers for ``m``."""
    catalogue, metrics = Catalogue(lambda *_: asyncio.Future()), Metrics()
    shelf = catalogue.shelves["m"] = Shelf()
    shelf.versions["1"] = model.desk
    shelf.take("1", 1.0, shadow=False)
    limits, bodies = Limits(slo_s=slo_s), Bodies(1 << 20)
    return Direct(
        Common(limits=limits, metrics=metrics, catalogue=catalogue, guard=None, bodies=bodies, pace=Pace(slo_s))
    ), shelf


def test_who_has_no_hope_is_turned_away_unread_and_counted_each_time(model: _Model) -> None:
    body = b'{"inputs": [{"name": "input", "datatype": "FP32", "shape": [1, 1], "data": [4]}]}'
    own = body[:-1] + b', "parameters": {"timeout": 60000000}}'

    async def run() -> None:
        direct, _ = _direct(model, 10.0)

        def ask(said: bytes) -> bytes | Refusal | None:
            route = direct.route(b"/v2/models/m/infer", [(b"content-length", b"%d" % len(said))])
            assert route is not None
            planned, asker = direct.plan(route), _Asker()
            assert planned is not None and direct.begin(planned, said, asker)
            return asker.answered

        for value in range(_SLOTS):
            model.ask(value)
        for times, said in enumerate((body, body, own, body), 1):
            found = ask(said)
            assert isinstance(found, Refusal) and found.status == 429 and found.retry_after_s
            assert model.slots.counts[Outcome.REFUSED] == times
        model.compute()
        # One with a deadline of its own is looked at, though others shortly before had no hope.
        assert ask(own) is None
        # So are all a moment later.
        while direct.plan(direct.route(b"/v2/models/m/infer", [(b"content-length", b"9")])).refuse:  # type: ignore
            await asyncio.sleep(0.01)
        assert ask(body) is None
        # On a slow machine some of them wait for the next turn.
        while len(direct._inbox):
            await asyncio.sleep(0)
        model.compute()

    asyncio.run(run())
    counts = model.slots.counts
    assert counts[Outcome.ACCEPTED] == counts[Outcome.ANSWERED] == _SLOTS + 2 and counts[Outcome.REFUSED] == 4


def test_who_read_the_head_before_a_version_left_asks_the_application(model: _Model) -> None:
    body = b'{"inputs": [{"name": "input", "datatype": "FP32", "shape": [1, 1], "data": [4]}]}'

    async def run() -> None:
        direct, shelf = _direct(model, 60.0)
        route = direct.route(b"/v2/models/m/infer", [(b"content-length", b"%d" % len(body))])
        assert route is not None
        plans = [direct.plan(route) for _ in range(2)]
        assert plans[0] is not None and plans[1] is not None
        first, second = _Asker(), _Asker()
        assert direct.begin(plans[0], body, first)
        model.compute()
        assert isinstance(first.answered, bytes) and first.answered.endswith(b'"data":[8.0]}]}')
        del shelf.versions["1"]
        assert not direct.begin(plans[1], body, second) and second.answered is None

    asyncio.run(run())
    assert model.slots.counts[Outcome.ACCEPTED] == model.slots.counts[Outcome.ANSWERED] == 1
