"""Garbage is collected after steps of its own, unless steps leave some behind."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator

import pytest

from shoal.train.garbage import Garbage


class _Knot:
    """Refers to itself."""

    def __init__(self) -> None:
        self.own = self


@pytest.fixture(autouse=True)
def _collector_as_it_was() -> Iterator[None]:
    gc.collect()
    yield
    gc.enable()


def test_steps_without_cycles_are_not_interrupted() -> None:
    garbage = Garbage()
    garbage.between()
    assert gc.isenabled()
    for _ in range(70):
        garbage.between()
    assert not gc.isenabled()
    with garbage.automatic():
        assert gc.isenabled()
    assert not gc.isenabled()


def test_steps_that_leave_cycles_get_the_usual_collector_back() -> None:
    garbage = Garbage()
    knots = []
    for _ in range(16):
        knots.append(weakref.ref(_Knot()))
        garbage.between()
    assert gc.isenabled() and all(knot() is None for knot in knots)


def test_a_cycle_that_comes_later_is_found() -> None:
    garbage = Garbage()
    for _ in range(63):
        garbage.between()
    assert not gc.isenabled()
    knot = weakref.ref(_Knot())
    garbage.between()
    assert knot() is None and gc.isenabled()


def test_whoever_has_turned_the_collector_off_keeps_it_off() -> None:
    gc.disable()
    garbage = Garbage()
    for _ in range(20):
        garbage.between()
    with garbage.automatic():
        assert not gc.isenabled()


def test_what_an_evaluation_leaves_behind_is_not_the_steps() -> None:
    garbage = Garbage()
    for _ in range(20):
        garbage.between()
    with garbage.automatic():
        knot = weakref.ref(_Knot())
    for _ in range(50):
        garbage.between()
    assert knot() is None and not gc.isenabled()
