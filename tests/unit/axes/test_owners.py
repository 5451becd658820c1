from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from shoal.axes.owners import owning_stages


def test_a_tied_embedding_goes_to_the_stage_that_holds_less() -> None:
    sizes = {"embed": 10, "a": 30, "b": 30, "c": 30}
    uses = {"embed": [0, 1], "a": [0], "b": [0], "c": [1]}
    assert owning_stages(sizes, uses) == {"embed": 1, "a": 0, "b": 0, "c": 1}
    assert owning_stages({"embed": 10}, {"embed": [2, 1]}) == {"embed": 1}


@given(st.lists(st.tuples(st.integers(0, 99), st.sets(st.integers(0, 3), min_size=1)), max_size=8))
def test_every_owner_uses_its_weight_and_the_order_does_not_matter(weights: list[tuple[int, set[int]]]) -> None:
    sizes = {str(k): size for k, (size, _) in enumerate(weights)}
    uses = {str(k): sorted(stages) for k, (_, stages) in enumerate(weights)}
    found = owning_stages(sizes, uses)
    assert found.keys() == uses.keys() and all(found[name] in uses[name] for name in uses)
    assert found == owning_stages(sizes, dict(reversed(uses.items())))
