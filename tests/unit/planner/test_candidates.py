from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shoal.plan import Plan
from shoal.planner.candidates import local_candidates


@given(st.integers(1, 70), st.integers(1, 200), st.booleans())
def test_every_candidate_is_complete_fits_the_machine_and_comes_once(cores: int, batch: int, images: bool) -> None:
    found = local_candidates(Plan(), cores, batch, images)
    assert len(set(found)) == len(found)
    for plan in found:
        assert plan.complete
        assert plan.world_size <= batch
        assert plan.world_size * (plan.threads or 0) <= cores
    assert found[0].world_size == 1
    assert {plan.layout for plan in found} == ({"contiguous", "channels_last"} if images else {"contiguous"})


def test_two_cores() -> None:
    named = [(plan.dp, plan.threads) for plan in local_candidates(Plan(), 2, 100, images=False)]
    assert named == [(1, 1), (1, 2), (2, 1)]


def test_what_the_user_fixed_stays() -> None:
    wanted = Plan.parse("dp=3,accumulate=2,layout=channels_last")
    found = local_candidates(wanted, 8, 100, images=True)
    assert found
    assert all((p.dp, p.accumulate, p.layout) == (3, 2, "channels_last") for p in found)
    assert {p.threads for p in local_candidates(Plan.parse("threads=5"), 8, 100, images=False)} == {5}
