"""A parameter server under ``sync`` gives the weights of one worker, whatever the workers are made of.

One plain run of each job is the oracle; several habits share a run, because each run costs seconds to start.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import convex
import model_zoo as zoo
import pytest
import torch
from plain_torch import assert_equal

import shoal
from shoal.errors import PlanError
from shoal.observe.events import read_events
from shoal.train.run import Run

STEPS = 20


@pytest.fixture(scope="module", autouse=True)
def _no_export() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHOAL_EXPORT", "0")
        yield


def train(job: shoal.Job, plan: str, directory: Path, steps: int = STEPS, **options: Any) -> Run:
    return shoal.train(job, plan=f"{plan},threads=1", run_dir=directory / "run", steps=steps, **options)


def gpt() -> shoal.Job:
    """A tied head, clipping, a schedule by steps, evaluation."""
    return zoo.job(
        "gpt", grad_clip=0.5,
        scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 7, 0.5),
    )  # fmt: skip


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return train(gpt(), "dp=1", tmp_path_factory.mktemp("alone"))


@pytest.mark.parametrize(
    "plan", ["ps=2,workers=2,sync", "tp=2,ps=1,sync", "pp=2,microbatches=3,ps=3,sync", "tp=2,ps=2,workers=2,sync"]
)
def test_weights_and_losses_are_one_workers(alone: Run, plan: str, tmp_path: Path) -> None:
    run = train(gpt(), plan, tmp_path)
    assert_equal(run.weights(), alone.weights(), within=1e-9)
    for found, expected in zip(run.history, alone.history, strict=True):
        found.pop("samples_per_s")
        assert found == pytest.approx({k: v for k, v in expected.items() if k != "samples_per_s"}, rel=1e-8)


def nadam(params: Any) -> torch.optim.Optimizer:
    return torch.optim.NAdam(params, lr=3e-3)


@pytest.mark.parametrize(
    ("name", "dtype", "within", "changes"),
    [
        # BatchNorm over the global batch, SGD with momentum; the last batch is ragged.
        ("resnet", torch.float32, 1e-5, {"optimizer": lambda p: torch.optim.SGD(p, lr=0.02, momentum=0.9)}),
        # Whole tensors, dealt out to the servers.
        ("odd", torch.float64, 1e-9, {"optimizer": nadam}),
    ],
)
def test_weights_are_one_workers(
    name: str, dtype: torch.dtype, within: float, changes: dict[str, Any], tmp_path: Path
) -> None:
    job = zoo.job(name, dtype, eval_data=None, **changes)
    one = train(job, "dp=1", tmp_path / "one").weights()
    assert_equal(train(job, "ps=2,workers=3,sync", tmp_path / "many").weights(), one, within)


def test_a_run_goes_on_with_other_servers_and_without(alone: Run, tmp_path: Path) -> None:
    """From three servers to one, to none, and back to two; what the events say is exact all along."""
    steps = (6, 11, 15, STEPS)
    plans = ("ps=3,workers=2,sync", "ps=1,workers=3,sync", "dp=2", "ps=2,workers=2,sync")
    for number, (plan, until) in enumerate(zip(plans, steps, strict=True)):
        run = train(gpt(), plan, tmp_path, until, resume=number > 0)
    assert_equal(run.weights(), alone.weights(), within=1e-9)
    per_epoch = -(-zoo.SAMPLES // gpt().batch_size)
    found = [
        ((e["epoch"] - 1) * per_epoch + e["batch"], e["shard"], e["staleness"], e["versions"])
        for e in read_events(run.path / "events.jsonl", {"push_ack"})
    ]
    expected = []
    for plan, first, last in zip(plans, (0, *steps[:-1]), steps, strict=True):
        if plan.startswith("ps"):
            servers, workers = int(plan[3]), int(plan[13])
            expected += [(s, w, 0, [s] * servers) for s in range(first + 1, last + 1) for w in range(workers)]
    assert found == expected


def test_more_servers_than_parameters_are_refused_in_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(PlanError, match=r"ps=5000 is more servers than parameters .*; use ps=\d+ or fewer\.") as refused:
        train(zoo.job("odd"), "ps=5000", tmp_path)
    assert refused.value.exit_code == 2 and not (tmp_path / "run").exists()
    with pytest.raises(PlanError, match=r"ps=60 .*; use ps=\d+ or fewer\."):
        train(zoo.job("odd", optimizer=nadam), "ps=60", tmp_path)


def test_lbfgs_on_servers_is_torchs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Servers die in the midst of an update, and become more.

    The history goes along from a checkpoint, and under another plan.
    """
    steps = 25
    job = convex.job(steps)
    monkeypatch.setenv("SHOAL_FAULTS", "kill(server=1,step=7,phase=update);kill(server=0,step=9,phase=taken)")
    train(job, "ps=2,workers=2,sync", tmp_path, 15)
    run = train(
        job, "ps=1,workers=1,sync", tmp_path, steps, resume=True,
        on_event=lambda e: shoal.Plan.parse("ps=3,workers=2") if (e["kind"], e.get("step")) == ("step", 20) else None,
    )  # fmt: skip
    assert len(list(read_events(run.path / "events.jsonl", {"replan"}))) == 1
    assert_equal(run.weights(), convex.by_torch(steps), within=1e-9)
    with pytest.raises(PlanError, match="runs on parameter servers"):
        train(job, "dp=2", tmp_path / "dp")
