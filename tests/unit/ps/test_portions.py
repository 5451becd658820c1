from __future__ import annotations

import itertools
import random
from collections.abc import Iterator

import pytest

from shoal.comm.arena import Arena, ArenaLayout
from shoal.comm.grid import Grid
from shoal.comm.store import VALUE_COLUMNS
from shoal.ps.portions import Given, Later, PortionColumns, Portions, portion_bytes, spare_stripes

WORKERS, COUNT = 3, 5
STRIPES = WORKERS + spare_stripes(COUNT)


@pytest.fixture
def arena() -> Iterator[Arena]:
    grid = Grid(dp=WORKERS, servers=1)
    arena = Arena.create(ArenaLayout.plan(WORKERS, {"portions": portion_bytes(WORKERS, COUNT)}, grid))
    yield arena
    arena.memory.close()


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def found(loss: float) -> list[float]:
    return [loss, 1.0, 4.0, 0.0, *[0.0] * VALUE_COLUMNS]


def take(portions: Portions, worker: int, step: int = 0) -> Given:
    given = portions.take(worker, step)
    assert isinstance(given, Given)
    return given


def test_each_portion_is_handed_out_once_and_late_ones_again(arena: Arena) -> None:
    clock = Clock()
    portions = Portions(arena, COUNT, clock)
    assert portions.missing(0) == 0
    slow = take(portions, 2)
    assert slow.portion == 0
    for number in range(1, COUNT):
        clock.now += 1.0
        given = take(portions, 0)
        assert given.portion == number
        clock.now += 1.0
        assert portions.finish(0, 0, given, found(number))
    # The first is late: a portion takes a second. It goes to one more, and then to nobody for a while.
    assert portions.missing(0) == 2
    again = take(portions, 0)
    assert again.portion == 0 and again.stripe != slow.stripe
    later = portions.take(1, 0)
    assert isinstance(later, Later) and later.wait_s == pytest.approx(1.5)
    clock.now += 1.5
    third = take(portions, 1)
    assert third.portion == 0
    # The first result counts, and no other.
    assert not portions.is_done(0, 0)
    order: list[str] = []
    assert portions.finish(1, 0, third, found(7.0), lambda: order.append("settled"))
    assert order == ["settled"]
    assert portions.is_done(0, 0) and portions.missing(0) == -1
    for worker, given in ((0, again), (2, slow)):
        assert not portions.finish(worker, 0, given, found(8.0), lambda: order.append("twice"))
        assert portions.take(worker, 0) is None
    assert order == ["settled"] and portions.rows[0, PortionColumns.LOSS] == 7.0
    assert portions.told(0) == [(1, 3), (0, 1), (0, 1), (0, 1), (0, 1)]
    assert len(set(portions.stripes())) == COUNT


def test_without_a_result_nobody_knows_what_is_late(arena: Arena) -> None:
    clock = Clock()
    portions = Portions(arena, 1, clock)
    take(portions, 0)
    clock.now += 1000.0
    assert portions.take(1, 0) == Later(None)


def test_a_portion_that_nobody_is_at_goes_to_the_next(arena: Arena) -> None:
    """A worker that has died is followed by one that asks anew."""
    portions = Portions(arena, COUNT, Clock())
    first = take(portions, 0)
    assert take(portions, 1).portion == 1
    assert take(portions, 0).portion == first.portion
    assert portions.told(0)[0] == (0, 0) and portions.rows[0, PortionColumns.GIVEN] == 2


def test_who_is_late_for_a_step_finds_nothing_of_it_and_its_stripe_is_nobody_elses(arena: Arena) -> None:
    """Whatever the order in which things happen: no two gradients share a stripe, each portion counts once."""
    draw = random.Random(3)
    clock = Clock()
    portions = Portions(arena, COUNT, clock)
    at: dict[int, tuple[int, Given]] = {}
    counted: dict[int, list[int]] = {}
    for step in itertools.count():
        if step == 40:
            break
        while portions.missing(step) >= 0:
            worker = draw.randrange(WORKERS)
            clock.now += draw.random() * 3
            if worker in at and draw.random() < 0.7:
                of, given = at.pop(worker)
                if portions.finish(worker, of, given, found(0.0)):
                    assert of == step
                    counted.setdefault(step, []).append(given.portion)
            elif worker not in at or draw.random() < 0.3:
                # In the second case it has died, and this is its successor.
                at.pop(worker, None)
                if isinstance(given := portions.take(worker, step), Given):
                    at[worker] = (step, given)
            done = [s for s, row in zip(portions.stripes(), portions.rows, strict=True) if row[PortionColumns.DONE] == step + 1]
            used = done + [given.stripe for _, given in at.values()]
            assert len(set(used)) == len(used) and all(0 <= stripe < STRIPES for stripe in used)
        assert sorted(counted[step]) == list(range(COUNT))
    assert portions.take(0, 3) is None
