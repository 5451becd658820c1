from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from shoal.errors import NotBuiltError, PlanError
from shoal.job import Job
from shoal.plan import Plan
from shoal.planner.memory import Limits, ModelMemory, Unit
from shoal.train.choose import check_plan, given_text, remarks
from shoal.train.forecast import Measured, limit_text, measure, units_of_stages
from shoal.train.host import TrainHost
from shoal.train.joined import fit_plan

WIDTH = 32


def data() -> Any:
    return torch.randn(40, WIDTH), torch.zeros(40, dtype=torch.long)


def net() -> nn.Module:
    return nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(3)), nn.Linear(WIDTH, 2))


def job(**changes: Any) -> Job:
    given: dict[str, Any] = {
        "model": net, "train_data": data, "loss": nn.functional.cross_entropy, "batch_size": 16,
        "optimizer": lambda params: torch.optim.Adam(params),
    }  # fmt: skip
    return Job(**{**given, **changes})


def test_what_is_measured_of_a_job() -> None:
    host = TrainHost(
        job(metrics={"first": lambda output, target: output[0, 0]}, weight=lambda batch: float(len(batch[0])))
    )
    found = measure(host._built, host.facts(), Plan.parse("dp=2,threads=1"), ["0.weight"])
    memory = found.memory
    assert not memory.guessed and (memory.batch, memory.state_tensors) == (16, 2)
    assert {w.name for w in memory.weights if w.split} == {"0.weight"}
    assert sum(w.nbytes for w in memory.weights) == 4 * (3 * (WIDTH + 1) * WIDTH + 2 * (WIDTH + 1))
    # This very process, without the model.
    assert 50e6 < memory.process_bytes < 10e9
    assert found.homes["0.weight"] == (1,) and found.homes["3.bias"][0] >= 4


def test_a_job_with_its_own_step_is_measured_without_values() -> None:
    def step(model: nn.Module, batch: Any) -> Any:
        output = model(batch[0])
        return {"loss": nn.functional.cross_entropy(output, batch[1]), "largest": output.max()}

    host = TrainHost(job(loss=None, step=step))
    assert not measure(host._built, host.facts(), Plan.parse("dp=1,threads=1"), ()).memory.guessed


def test_units_follow_their_stage() -> None:
    memory = ModelMemory(weights=(), units=tuple(Unit(saved=1.0) for _ in range(5)), batch=1)
    homes = {"embed": (0, 4), "pos": (0,), "a": (1,), "b": (2,), "c": (3,), "norm": (4,)}
    stages = [["embed", "pos", "a"], ["b", "c", "norm", "embed"]]
    assert units_of_stages(Measured(memory, homes), stages) == [[0, 1], [2, 3, 4]]
    # A unit without weights of its own goes with what comes before it.
    assert units_of_stages(Measured(memory, {"a": (1,), "c": (3,)}), [["a"], ["c"]]) == [[0, 1, 2], [3, 4]]


def test_limits_by_name() -> None:
    assert limit_text(Limits(worker_bytes=2 * 10**9)) == "2.0 GB a worker"
    assert limit_text(Limits(machine_bytes=24 * 10**9)) == "the 24.0 GB of this machine"


@pytest.mark.parametrize(
    ("text", "error", "said"),
    [
        ("dp=17", PlanError, "17 workers cannot share a batch of 16 samples"),
        ("dp=2,accumulate=17", PlanError, "accumulate=17 cuts a batch of 16"),
        ("dp=2,tp=2,local_steps=2", NotBuiltError, "tp=2 lets several compute together"),
        ("dp=2,pp=2,local_steps=2", NotBuiltError, "pp=2 lets several compute together"),
    ],
)
def test_plans_that_no_job_of_this_size_can_have(text: str, error: type[Exception], said: str) -> None:
    facts = TrainHost(job()).facts()
    with pytest.raises(error, match=said):
        check_plan(Plan.parse(text), job(), facts)


def test_a_plan_says_what_was_given_what_follows_and_what_changes_nothing() -> None:
    whole = Plan.parse("pp=2,microbatches=8,schedule=1f1b,threads=1").filled()
    assert given_text(Plan.parse("pp=2"), whole) == (
        "pp=2 was given; microbatches=8, schedule=1f1b, threads=1, batchnorm=micro follow."
    )
    assert given_text(Plan.parse("dp=2,threads=1"), Plan.parse("dp=2,threads=1").filled()) == (
        "dp=2,threads=1 was given as it is."
    )
    said = {text: remarks(Plan.parse(text)) for text in ("dp=2,zero=2", "dp=1,zero=3", "dp=1,microbatches=3", "dp=2")}
    assert "what workers on one machine do anyway" in said["dp=2,zero=2"][0]
    assert "nobody to share with" in said["dp=1,zero=3"][0]
    assert "computed in turn" in said["dp=1,microbatches=3"][0]
    assert said["dp=2"] == []


def test_plans_of_workers_that_share_no_memory_fit_the_number_of_processes() -> None:
    for text in ("dp=2,zero=1", "dp=2,zero=3", "tp=2", "pp=2"):
        assert fit_plan(Plan.parse(text), 2, 1).world_size == 2
    assert fit_plan(Plan.parse("zero=2"), 4, 1).data_ways == 4
    with pytest.raises(PlanError, match="dp=2,pp=2 takes 4 processes .* write pp=2, or start 4 processes"):
        fit_plan(Plan.parse("dp=2,pp=2"), 2, 1)
    with pytest.raises(NotBuiltError, match="has the plan ps=1; .* say so again: --plan ps=1,workers=2"):
        fit_plan(Plan.parse("ps=1,workers=2"), 2, 1)
