"""Who of a job's processes keeps which server or worker, under one plan after the other."""

import pytest

from shoal.errors import RequestError
from shoal.plan import Plan
from shoal.train.remote.keepers import Keepers, roles


def test_each_process_keeps_one_and_those_that_are_not_needed_keep_nobody() -> None:
    keepers = Keepers(["a", "a", "b", "b", "b"], Plan.parse("ps=2,workers=1,async,replicas=1"))
    # The copies of the first machine's servers are on the second.
    assert [keepers.keeps(place) for place in range(5)] == [
        ("server", 0, 0), ("server", 1, 0), ("server", 2, 0), ("server", 3, 0), ("worker", 0, 0),
    ]  # fmt: skip
    smaller = Plan.parse("ps=1,workers=2,async,replicas=1")
    keepers.refuse(smaller)
    keepers.appoint(smaller)
    assert [keepers.keeps(place) for place in range(5)] == [
        ("server", 0, 1), ("worker", 0, 1), ("server", 1, 1), ("worker", 1, 1), ("", 0, 1),
    ]  # fmt: skip
    keepers.appoint(smaller, only="worker")
    assert [keepers.keeps(place)[2] for place in range(5)] == [1, 2, 1, 2, 1]
    keepers.renew([("worker", 0), ("worker", 7)])
    assert [keepers.keeps(place)[2] for place in range(5)] == [1, 3, 1, 2, 1]
    with pytest.raises(RequestError, match=r"takes 6 processes, and torchrun or Slurm has started 5"):
        keepers.refuse(Plan.parse("ps=2,workers=2,async,replicas=1"))
    # Whoever is none of them keeps nobody.
    assert keepers.keeps(9) == ("", 0, 0)
    assert not keepers.have_left
    for place in range(1, 5):
        keepers.leave(place)
    assert keepers.have_left


def test_without_copies_servers_come_first_and_in_order() -> None:
    assert roles([""] * 4, Plan.parse("ps=2,workers=1,async")) == [("server", 0), ("server", 1), ("worker", 0), ("", 0)]
