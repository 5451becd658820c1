"""What a lead hands out again, and whose buffers count."""

from __future__ import annotations

import torch

from shoal.train.remote.dealing import Dealt, Left


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_portion_that_is_late_is_handed_out_again_and_counts_once() -> None:
    clock = Clock()
    dealt = Dealt(clock)
    assert dealt.late() is None
    for unit in (8, 9, 10):
        dealt.give(unit, rank=unit - 8)
    clock.now += 10.0
    # Nobody knows yet how long one takes.
    assert dealt.late() is None
    dealt.finish(10, 2)
    assert dealt.late() is None
    clock.now += 5.0
    assert dealt.late() == 8
    dealt.give(8, 2)
    # Now the fewest are at the other one.
    assert dealt.late() == 9
    dealt.give(9, 0)
    assert dealt.late() is None
    assert dealt.times(8) == dealt.times(9) == 2 and dealt.times(10) == 1
    # Of two who are at it one is lost, and then the other.
    assert dealt.lose(8, 0) and not dealt.lose(8, 2)
    assert dealt.late() == 8
    dealt.finish(9, 1)
    assert dealt.done == (9,)
    dealt.begin()
    assert dealt.late() is None and dealt.done == () and dealt.times(8) == 0


def test_the_buffers_that_count_are_those_of_the_first_unit_with_samples_whenever_it_is_there() -> None:
    left, found = Left(), {"mean": torch.zeros(2)}
    assert left.buffers is None
    for unit in (5, 3, 4):
        found["mean"].fill_(unit)
        left.leave(unit, found)
    assert left.buffers is not None and left.buffers["mean"].tolist() == [3.0, 3.0]
