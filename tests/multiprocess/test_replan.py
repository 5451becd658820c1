"""A run whose plan changes while it runs comes to the weights of one that never changed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from noisy_job import Auc, events
from plain_torch import assert_equal
from torch import nn

import shoal
from shoal.plan import Plan


@pytest.fixture(scope="module", autouse=True)
def _no_export() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHOAL_EXPORT", "0")
        yield


def changing(changes: dict[int, str]) -> Callable[[dict[str, Any]], Plan | None]:
    """An observer that wants another plan after these steps."""

    def on_event(event: dict[str, Any]) -> Plan | None:
        wanted = changes.get(event["step"]) if event["kind"] == "step" else None
        return Plan.parse(wanted) if wanted else None

    return on_event


def model() -> nn.Module:
    return nn.Sequential(
        nn.Linear(12, 32), nn.BatchNorm1d(32), nn.Tanh(), nn.Linear(32, 32), nn.Tanh(), nn.Linear(32, 2)
    ).double()  # fmt: skip


def data() -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(203, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return x, (x.sum(1) > 0).long()


def test_weights_and_history_are_those_of_a_run_that_never_changed(tmp_path: Path) -> None:
    """Servers, workers and parts of the model come and go. Clipping, a schedule, BatchNorm, a metric with a state."""
    job = shoal.Job(
        name="changing", model=model, train_data=data, eval_data=data, loss=nn.functional.cross_entropy, batch_size=20,
        epochs=2, optimizer=lambda params: torch.optim.Adam(params, lr=0.01), grad_clip=0.5, metrics={"auc": Auc()},
        scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 7, 0.5),
    )  # fmt: skip
    alone = shoal.train(job, plan="dp=1,threads=1", run_dir=tmp_path / "alone")
    changes = {
        2: "ps=2,workers=3", 4: "ps=50000", 7: "dp=2", 11: "ps=1,workers=2", 14: "tp=2,ps=1", 17: "dp=1", 18: "dp=1",
    }  # fmt: skip
    run = shoal.train(
        job, plan="ps=1,workers=2,sync,threads=1", run_dir=tmp_path / "changed", on_event=changing(changes)
    )
    assert_equal(run.weights(), alone.weights(), within=1e-9)
    for found, expected in zip(run.history, alone.history, strict=True):
        found.pop("samples_per_s")
        assert found == pytest.approx({k: v for k, v in expected.items() if k != "samples_per_s"}, rel=1e-8)

    told = events(run.path, "replan")
    assert [(e["step"], e["world_size"], e["by"]) for e in told] == [
        (step, world, "on_event") for step, world in ((2, 3), (7, 2), (11, 2), (14, 2), (17, 1))
    ]
    assert all(e["pause_s"] > 0 and e["why"] for e in told)
    assert all(a["plan"] == b["before"] for a, b in zip(told, told[1:], strict=False))
    (many, same) = (e["text"] for e in events(run.path, "warning"))
    assert many.startswith("The plan was not changed: ps=50000 is more servers than parameters") and "already" in same
    assert [e["step"] for e in events(run.path, "step")] == list(range(1, 23))
    assert len(events(run.path, "run_start")) == len(events(run.path, "plan")) == 1 and not events(run.path, "death")
    # What is written down is the plan that is: a resume takes it, the list of runs shows it.
    assert str(run.plan) == told[-1]["plan"] == str(Plan.from_toml((run.path / "plan.toml").read_text()))
    # Nothing of who asked, and of what was reserved, stays behind.
    assert not list(run.path.glob("replan-*"))
