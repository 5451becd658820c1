"""Which process of a job holds what, so that a machine that is gone takes no shard with it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from shoal.errors import WorkerLostError
from shoal.ps.messages import Refused
from shoal.train.remote import words
from shoal.train.remote.keeper import Keeper, spread


def test_those_that_hold_a_shard_are_on_different_machines_as_far_as_there_are_machines():
    # Two machines of four: servers 0 and 1 on the first, their copies 2 and 3 on the second, workers 4 to 7 in order.
    assert spread(["a"] * 4 + ["b"] * 4, 2, 1) == (0, 1, 4, 5, 2, 3, 6, 7)
    # Three of two, and two copies each: no machine has anything twice.
    machines = ["a", "a", "b", "b", "c", "c", "c"]
    found = spread(machines, 2, 2)
    assert sorted(found) == list(range(7)) and found[0] == 0
    for shard in (0, 1):
        assert len({machines[rank] for rank, number in enumerate(found) if number < 6 and number % 2 == shard}) == 3
    # One machine has all, in order.
    assert spread(["a"] * 5, 2, 1) == (0, 1, 2, 3, 4)


@pytest.mark.parametrize(("joined", "deaths"), [(True, 20), (False, 5), (None, 1)])
def test_who_has_joined_is_started_again_however_often_it_dies_and_who_has_not_is_given_up(joined: bool | None, deaths: int):
    """Whether it had joined is what the lead answers; None: the run has ended, and nobody is missed."""
    started = []

    def start(role: str, rank: int) -> Any:
        started.append((role, rank))
        return SimpleNamespace(pid=len(started), poll=lambda: -9)

    def send(place: int, make: Any) -> Any:
        said = make(1)
        assert (said.role, said.rank, said.pid, said.cause) == ("worker", 3, len(started), "SIGKILL") and said.host
        return SimpleNamespace(answer=Refused(1, "over") if joined is None else words.Heard(1, words.Orders(), counts=joined))

    nursery, line = SimpleNamespace(start=start), SimpleNamespace(send=send, again=lambda ticket: None)
    keeper = Keeper(nursery, line, "worker", 3)  # type: ignore[arg-type]
    keeper.start()
    if joined is False:
        with pytest.raises(WorkerLostError, match="Worker 3 died 5 times before it had begun"):
            for _ in range(2 * deaths):
                keeper.attend()
    else:
        for _ in range(2 * 20):
            keeper.attend()
    assert len(started) == deaths + bool(joined)
