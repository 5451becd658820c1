from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.plan import Plan
from shoal.plan_grammar import read_text
from shoal.planner.candidates import in_microbatches, local_candidates, sub_batches


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


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("tp=2", "dp=1,tp=2,pp=1,threads=4,layout=contiguous"),
        ("pp=2", "pp=2,microbatches=8,schedule=1f1b,threads=4,batchnorm=micro"),
        ("dp=2,pp=4", "microbatches=16,threads=1"),
        ("pp=2,dp=20", "microbatches=5"),
        ("pp=2,accumulate=30", "microbatches=3"),
        ("pp=2,schedule=interleaved", "microbatches=8,interleave=2"),
        ("pp=2,interleave=3", "schedule=interleaved,interleave=3"),
        ("pp=2,schedule=zbv,microbatches=6", "schedule=zbv,microbatches=6"),
        ("pp=2,batchnorm=global", "microbatches=1,batchnorm=global"),
        ("dp=16,tp=2", "threads=1"),
        ("zero=3", "dp=8,threads=1,zero=3"),
        ("microbatches=4,dp=1,threads=1", "microbatches=4,batchnorm=micro"),
    ],
)
def test_a_split_plan_is_filled_in_one_way_and_not_tried(text: str, expected: str) -> None:
    found = local_candidates(Plan.parse(text), 8, 100, images="microbatches=4" not in text)
    if not text.startswith("microbatches"):
        assert len(found) == 1
    assert all(plan.complete and Plan.parse(text).values().items() <= plan.values().items() for plan in found)
    assert read_text(expected).items() <= found[0].values().items()


@given(st.integers(1, 5), st.integers(1, 9), st.integers(1, 300))
def test_no_pipeline_has_more_microbatches_than_samples(dp: int, pp: int, batch: int) -> None:
    plan = in_microbatches(Plan(dp=dp, pp=pp), batch)
    if pp == 1:
        assert plan == Plan(dp=dp, pp=pp)
    else:
        assert 1 <= (plan.microbatches or 0) <= max(1, min(4 * pp, batch // dp))
        assert in_microbatches(plan, batch) == plan


def test_sub_batches_are_halves_while_a_few_samples_are_left() -> None:
    assert sub_batches(100) == (50, 25, 13)
    assert sub_batches(17) == (9,)
    assert sub_batches(15) == ()
