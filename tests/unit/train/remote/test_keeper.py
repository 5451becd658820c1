"""Which process of a job holds what, so that a machine that is gone takes no shard with it."""

from shoal.train.remote.keeper import spread


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
