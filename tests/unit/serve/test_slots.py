"""The memory between gateway and replicas."""

from __future__ import annotations

import os

import numpy as np
import pytest

from shoal.serve.signature import TensorSignature
from shoal.serve.slots import RING_ENTRIES, TEXT_BYTES, Outcome, SlotLayout, Slots, drain

_LAYOUT = SlotLayout(
    slots=5, rings=2, max_batch=4,
    inputs=(TensorSignature("a", "UINT8", (-1, 3, 2)), TensorSignature("b", "FP64", (-1,))),
    outputs=(TensorSignature("c", "FP32", (-1, 7)),),
)  # fmt: skip


@pytest.fixture
def both() -> tuple[Slots, Slots]:
    """The same memory, mapped twice, as by two processes."""
    first = Slots.create(_LAYOUT)
    return first, Slots(os.dup(first.fd), _LAYOUT)


def test_rows_of_one_side_are_seen_by_the_other(both: tuple[Slots, Slots]) -> None:
    here, there = both
    rng = np.random.default_rng(0)
    a, b, c = rng.integers(0, 255, (5, 3, 2), np.uint8), rng.normal(size=5), rng.normal(size=(5, 7)).astype(np.float32)
    for place, values in zip((*here.inputs, *here.outputs), (a, b, c), strict=True):
        place[[0, 1, 2, 3, 4]] = values
    for place, values in zip((*there.inputs, *there.outputs), (a, b, c), strict=True):
        np.testing.assert_array_equal(place, values)
        np.testing.assert_array_equal(place[[4, 1]], values[[4, 1]])


def test_ring_hands_batches_over_in_order_and_reuses_entries(both: tuple[Slots, Slots]) -> None:
    gateway, replica = both[0].rings[1], both[1].rings[1]
    for batch in range(3 * RING_ENTRIES):
        slots = [batch % 5, (batch + 1) % 5][: 1 + batch % 2]
        number = gateway.post(slots)
        assert number == batch and replica.posted == batch + 1
        assert replica.slots_of(replica.done) == slots
        replica.finish(0.25 * batch, None if batch % 3 else "why " + "ä" * TEXT_BYTES)
        took, failure = gateway.result(number)
        assert took == 0.25 * batch
        assert (failure is None) == bool(batch % 3)
        assert failure is None or failure.startswith("why ää")
    assert both[0].rings[0].posted == 0


def test_reset_forgets_what_was_not_done(both: tuple[Slots, Slots]) -> None:
    ring = both[0].rings[0]
    ring.post([1])
    ring.post([2])
    ring.reset()
    assert ring.done == ring.posted == 2
    assert ring.post([3]) == 2


def test_outcomes_add_up(both: tuple[Slots, Slots]) -> None:
    here, there = both
    here.count(Outcome.ACCEPTED, 6)
    for outcome in (Outcome.ANSWERED, Outcome.EXPIRED, Outcome.FAILED, Outcome.CANCELLED):
        here.count(outcome)
    here.count(Outcome.REFUSED, 100)
    assert there.open_requests() == 2


def test_drain_takes_every_waking_and_does_not_block() -> None:
    fd = os.eventfd(3, os.EFD_SEMAPHORE)
    drain(fd)
    drain(fd)
    os.eventfd_write(fd, 1)
    assert os.eventfd_read(fd) == 1
    os.close(fd)
