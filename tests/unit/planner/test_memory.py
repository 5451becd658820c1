from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.plan import Plan
from shoal.planner.memory import (
    HOLES,
    Limits,
    ModelMemory,
    Need,
    Unit,
    Weight,
    axes_text,
    cut_stages,
    in_flight,
    machine_need,
    propose,
    refusal,
    size_text,
    worker_need,
)

MB = 10**6


def make(blocks: int = 4, **changes: Any) -> ModelMemory:
    """An embedding of 40 MB that is the head too, and blocks of 100 MB; 1 MB of activations a sample and block."""
    weights = [Weight("embed", 40 * MB, 0, (blocks + 1,), split=True)]
    weights += [Weight(f"block.{i}", 100 * MB, i + 1, split=True) for i in range(blocks)]
    block = Unit(saved=MB, entry=MB / 10, peak=MB / 2, block=True)
    units = (Unit(saved=MB / 10), *(block for _ in range(blocks)), Unit(saved=MB, peak=MB))
    fields: dict[str, Any] = {"weights": tuple(weights), "units": units, "batch": 32, "process_bytes": 300 * MB}
    return ModelMemory(**{**fields, **changes})


def need(text: str, model: ModelMemory | None = None) -> Need:
    return worker_need(model or make(), Plan.parse(text))


def test_one_worker_holds_everything() -> None:
    found = need("dp=1")
    assert (found.weights, found.gradients, found.state) == (440 * MB, 440 * MB, 880 * MB)
    assert found.activations == pytest.approx(HOLES * 32 * (0.1 + 4 + 1 + 1) * MB)
    assert (found.gathered, found.process) == (0, 300 * MB)
    assert found.total == 440 * MB + 440 * MB + 880 * MB + found.activations + 300 * MB


def test_the_data_axis_shares_state_and_activations_but_not_weights() -> None:
    found = need("dp=2")
    # Its own stripe, and half of the other one.
    assert (found.weights, found.gradients, found.state) == (440 * MB, (440 + 220) * MB, 440 * MB)
    assert found.activations == pytest.approx(HOLES * 16 * 6.1 * MB)


def test_sharding_shares_everything_and_gathers() -> None:
    found = need("dp=4,zero=3")
    assert (found.weights, found.gradients, found.state) == (110 * MB, 110 * MB, 220 * MB)
    assert found.gathered == 4 * 100 * MB + 2 * 40 * MB
    # What is freed goes back at once: the heap has no holes.
    assert found.activations == pytest.approx(8 * 6.1 * MB)
    # In a pipeline each stage is shared by those who have it; a tied weight's gradient of another stage, too.
    stage, alone = need("dp=4,pp=2,zero=3,microbatches=4,schedule=1f1b"), need("pp=2,microbatches=4,schedule=1f1b")
    assert (stage.weights, stage.gradients, stage.state) == (
        alone.weights // 4, alone.gradients // 4, alone.state // 4,
    )  # fmt: skip
    assert stage.gathered == 4 * 100 * MB + 2 * 40 * MB
    assert need("dp=4,zero=2") == need("dp=4")
    assert need("dp=1,zero=3") == need("dp=1")


def test_the_tensor_axis_shares_what_is_split() -> None:
    found = need("tp=2")
    assert (found.weights, found.state) == (220 * MB, 440 * MB)
    whole = make(weights=(Weight("a", 100 * MB, 1, split=True), Weight("b", 60 * MB, 2)))
    assert need("tp=2", whole).weights == 110 * MB
    # Ten of 34 parts of a split unit's activations stay whole, and all of them where no weight is split.
    assert need("tp=2", whole).activations == pytest.approx(HOLES * 32 * (0.1 + (10 + 12) / 34 + 3 + 1 + 1) * MB)
    assert need("tp=2,sequence_parallel=on").activations == pytest.approx(need("dp=1").activations / 2)


def test_the_pipeline_shares_units_and_holds_what_is_in_flight() -> None:
    model = make()
    assert cut_stages(model, 2) == [[0, 1, 2], [3, 4, 5]]
    first = need("pp=2,microbatches=4,schedule=1f1b")
    # The tied weight is on both stages; the first one owns it and holds two microbatches of 8.
    assert (first.weights, first.state) == (240 * MB, 480 * MB)
    assert first.gradients == (240 + 40) * MB
    assert first.activations == pytest.approx(HOLES * 8 * (2 * 2.1 + 0.5) * MB)
    assert need("pp=2,microbatches=4,schedule=gpipe").activations > 1.5 * first.activations
    # Stages that were really cut come from outside: the second one, with three blocks, is the largest now.
    uneven = worker_need(model, Plan.parse("pp=2,microbatches=4,schedule=1f1b"), [[0, 1], [2, 3, 4, 5]])
    assert (uneven.weights, uneven.state) == (340 * MB, 600 * MB)


def test_only_what_lives_together_counts_together() -> None:
    """The first unit's backward pass is the last one, when all others have dropped what they saved."""
    units = (Unit(saved=MB, peak=10.0 * MB), Unit(saved=5.0 * MB, peak=2.0 * MB), Unit(saved=0, burst=20.0 * MB))
    at_once = make(units=units, weights=(), batch=1)
    assert need("dp=1", at_once).activations == pytest.approx(HOLES * (1 + 5 + 20) * MB)
    assert need("dp=1", make(units=units, weights=(), batch=4)).activations == pytest.approx(HOLES * (4 * 11) * MB)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("pp=4,microbatches=8,schedule=gpipe", [8, 8, 8, 8]),
        ("pp=4,microbatches=8,schedule=1f1b", [4, 3, 2, 1]),
        ("pp=4,microbatches=2,schedule=1f1b", [2, 2, 2, 1]),
        ("pp=4,microbatches=8,schedule=zbv", [4, 4, 4, 4]),
        ("pp=2,microbatches=8,schedule=interleaved,interleave=2", [2.5, 1.5]),
        ("dp=2", [1]),
    ],
)
def test_microbatches_in_flight(text: str, expected: list[float]) -> None:
    plan = Plan.parse(text)
    assert [in_flight(plan, stage) for stage in range(plan.pp or 1)] == expected


def test_recomputing_and_accumulating_save_activations() -> None:
    full = need("dp=1,recompute=full").activations
    # Each block's input, and one whole block at a time with its peak.
    # The last block's, or the loss' peak: the head has 1 + 1, a block 0.9 + 0.5 on top of what came before it.
    assert full == pytest.approx(HOLES * 32 * (0.1 + 4 * 0.1 + 1 + 1) * MB)
    assert need("dp=1,accumulate=4").activations == pytest.approx(need("dp=1").activations / 4)
    known = make(
        units=(Unit(saved=10.0, entry=1.0, block=True, recomputed={"selective": 4.0, "full": 2.0}),), weights=()
    )
    kept = [known.units[0].kept(mode) for mode in ("none", "selective", "full")]
    assert kept == [10.0, 4.0, 2.0]


def test_what_does_not_grow_with_the_batch_goes_with_a_block_that_is_recomputed() -> None:
    model = make(
        units=(Unit(saved=0, fixed=5.0 * MB), *(Unit(saved=0, fixed=7.0 * MB, block=True) for _ in range(4))),
        weights=(),
    )
    assert need("dp=1", model).activations == pytest.approx(HOLES * 33 * MB)
    assert need("dp=1,recompute=full", model).activations == pytest.approx(HOLES * 12 * MB)


def test_unequal_shares_count_by_the_largest() -> None:
    assert need("dp=2,shares=3+1").activations == pytest.approx(HOLES * 24 * 6.1 * MB)


def test_the_machine_holds_shared_things_once() -> None:
    def everything(text: str) -> int:
        return machine_need(make(), Plan.parse(text), need(text))

    one, two, sharded = (everything(text) for text in ("dp=1", "dp=2", "dp=2,zero=3"))
    private = 300 * MB + HOLES * 16 * 6.1 * MB
    assert two == pytest.approx(440 * MB + 440 * MB * (2 + 2) + 2 * private)
    assert one == pytest.approx(440 * MB + 440 * MB * 3 + 300 * MB + HOLES * 32 * 6.1 * MB)
    assert sharded == pytest.approx(440 * MB * (1 + 3) + 2 * (300 + 16 * 6.1 + 400 + 80) * MB)


@given(
    st.lists(st.integers(0, 50), min_size=1, max_size=7),
    st.integers(1, 9),
)
def test_stages_hold_every_unit_once_in_order_and_the_heaviest_is_as_light_as_can_be(
    sizes: list[int], count: int
) -> None:
    units = tuple(Unit(saved=float(size)) for size in sizes)
    model = ModelMemory(weights=(), units=units, batch=1, state_tensors=0)
    stages = cut_stages(model, count)
    assert len(stages) == count and [u for stage in stages for u in stage] == list(range(len(sizes)))
    if count <= len(sizes):
        assert all(stages)

        def lightest(start: int, parts: int) -> int:
            if parts == 1:
                return sum(sizes[start:])
            ends = range(start + 1, len(sizes) - parts + 2)
            return min(max(sum(sizes[start:end]), lightest(end, parts - 1)) for end in ends)

        assert max(sum(sizes[u] for u in stage) for stage in stages) == lightest(0, count)


# -- refusing ---------------------------------------------------------------------------------------------------------


def refused(model: ModelMemory, text: str, limits: Limits) -> str:
    plan = Plan.parse(text)
    return refusal(model, plan, need(text, model), limits, propose(model, plan, limits))


def test_the_plan_that_is_proposed_is_the_smallest_that_fits() -> None:
    limits = Limits(worker_bytes=1500 * MB, most_workers=4)
    assert not limits.hold(make(), Plan.parse("dp=1"), need("dp=1"))
    sentence = refused(make(), "dp=1", limits)
    assert sentence == (
        "dp=1 needs about 2.3 GB a worker (optimizer state 880 MB, weights 440 MB, gradients 440 MB, process 300 MB, "
        "activations 254 MB) and the limit is 1.5 GB; --plan pp=2 would fit with 1.3 GB a worker."
    )
    proposed = re.search(r"--plan (\S+)", sentence)
    assert proposed is not None
    chosen = need(proposed[1] + ",microbatches=8,schedule=1f1b")
    assert chosen.total <= 1500 * MB
    # A twentieth of the limit stays free: what is proposed shall fit when it runs.
    tight = propose(make(), Plan(), Limits(int(chosen.total * 1.01), most_workers=2))
    assert tight is not None and tight[0].recompute == "full"
    # Nothing else with two workers or fewer and one axis needs less.
    assert all(need(other).total >= chosen.total for other in ["dp=1", "dp=2", "dp=2,zero=3", "tp=2"])


def test_what_the_model_cannot_do_is_not_proposed() -> None:
    asked: list[str] = []

    def no_tensor_axis(plan: Plan) -> Need | None:
        asked.append(axes_text(plan))
        return None if (plan.tp or 1) > 1 else worker_need(make(), plan)

    found = propose(make(), Plan(), Limits(1100 * MB, most_workers=4), no_tensor_axis)
    assert found is not None and axes_text(found[0]) == "pp=4" and found[1].total <= 1100 * MB
    # In the order of preference, and no further than needed.
    assert asked.index("tp=4") < asked.index("pp=4") == len(asked) - 1
    # What a closer look says of a plan counts, not what seemed to be.
    large = propose(make(), Plan(), Limits(1500 * MB, most_workers=2), lambda plan: need("dp=1"))
    assert large is None


def test_a_pipeline_may_be_sharded_but_the_fewest_axes_come_first() -> None:
    found: list[Plan] = []
    propose(make(), Plan(), Limits(1400 * MB, most_workers=4), lambda plan: found.append(plan))
    texts = [axes_text(plan) for plan in found if plan.recompute == "none" and plan.world_size == 4]
    assert texts.index("pp=4") < texts.index("dp=2,pp=2,zero=3")


def test_recomputing_is_proposed_where_nothing_fits_without() -> None:
    heavy = make(units=tuple(Unit(saved=100.0 * MB, entry=MB, block=True) for _ in range(6)), batch=4)
    limits = Limits(3 * 10**9, most_workers=1)
    assert not limits.hold(heavy, Plan.parse("dp=1"), need("dp=1", heavy))
    assert "--plan recompute=full would fit" in refused(heavy, "dp=1", limits)


def test_what_was_asked_for_beside_the_axes_is_kept() -> None:
    wanted = Plan.parse("dp=1,accumulate=2,threads=1,precision=bf16,batchnorm=micro")
    found = propose(make(), wanted, Limits(1100 * MB, most_workers=4))
    assert found is not None
    assert (found[0].accumulate, found[0].threads, found[0].precision) == (2, 1, "bf16")
    assert axes_text(found[0]).endswith("accumulate=2,precision=bf16")


def test_where_nothing_fits_the_sentence_says_so() -> None:
    sentence = refused(make(guessed=True), "dp=2", Limits(310 * MB, most_workers=2))
    assert sentence.endswith(
        "and the limit is 310 MB (the activations are a guess); "
        "no plan with up to 2 workers fits; raise the limit, or use a smaller model or batch."
    )


def test_the_memory_of_the_machine_is_a_limit_too() -> None:
    sentence = refused(make(), "dp=4", Limits(machine_bytes=3 * 10**9, most_workers=4))
    assert sentence == (
        "dp=4 needs about 4.5 GB in all and the machine has 3.0 GB; --plan dp=1 would fit with 2.3 GB a worker."
    )


@pytest.mark.parametrize(("size", "text"), [(310e6, "310 MB"), (1.44e9, "1.4 GB"), (999.9e6, "1.0 GB"), (0, "0 MB")])
def test_sizes_as_people_write_them(size: float, text: str) -> None:
    assert size_text(size) == text
