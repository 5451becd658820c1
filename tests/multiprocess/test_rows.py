"""Runs with ``shoal.ps.Embedding``: equal to a plain loop under any plan, through kills, and on from a checkpoint (float64)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from keyed import Keyed, samples
from plain_torch import assert_equal
from torch.nn import functional as F

import shoal
from shoal.data.order import epoch_order
from shoal.errors import JobFailed
from shoal.ps.embedding import embeddings

SAMPLES, BATCH, EPOCHS, CLIP = 203, 48, 4, 0.5


@pytest.fixture(scope="module", autouse=True)
def _no_export() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHOAL_EXPORT", "0")
        yield


DATA = samples(SAMPLES)
SIZES = {"max_age": 6, "memory": 40_000}


def build() -> Keyed:
    return Keyed(**SIZES)


def make_job(**changes: Any) -> shoal.Job:
    job = shoal.Job(
        name="keyed", model=build, train_data=DATA, eval_data=DATA, loss=F.mse_loss, batch_size=BATCH, epochs=EPOCHS,
        optimizer=lambda params: torch.optim.SGD(params, lr=0.05, momentum=0.9), grad_clip=CLIP,
    )  # fmt: skip
    return job.replace(**changes)


@pytest.fixture(scope="module")
def expected() -> dict[str, torch.Tensor]:
    """What a plain loop comes to."""
    torch.manual_seed(0)
    model = build()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    keys, target = DATA
    for epoch in range(EPOCHS):
        for batch in torch.from_numpy(epoch_order(SAMPLES, 0, epoch)).split(BATCH):
            optimizer.zero_grad()
            F.mse_loss(model(keys[batch]), target[batch]).backward()
            found = [(module, module.take_gathered()) for _, module in embeddings(model)]
            gradients = [p.grad for p in model.parameters()] + [gathered.rows for _, gathered in found if gathered]
            scale = min(1.0, CLIP / (float(torch.sqrt(sum(g.square().sum() for g in gradients))) + 1e-6))
            for gradient in gradients:
                gradient.mul_(scale)
            for module, gathered in found:
                assert gathered is not None
                module.table.push(gathered.keys, gathered.rows, gathered.counts, step=module.steps)
                module.steps += 1
            optimizer.step()
    return model.state_dict()


def test_killed_workers_and_two_of_them_end_as_the_plain_loop(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, expected: dict[str, torch.Tensor]
) -> None:
    monkeypatch.setenv("SHOAL_FAULTS", "kill(rank=1,step=3,phase=published);kill(rank=0,step=9,phase=updated)")
    run = shoal.train(make_job(), plan="dp=2", run_dir=tmp_path / "run")
    deaths = [json.loads(line) for line in (tmp_path / "run" / "events.jsonl").read_text().splitlines()]
    assert sum(event["kind"] == "death" for event in deaths) == 2
    assert_equal(run.weights(), expected, 1e-9)
    # The bundle has the rows.
    assert run.evaluate()["eval_loss"] == pytest.approx(run.history[-1]["eval_loss"], rel=1e-9)
    assert not (tmp_path / "run" / "cold-rows").exists()


def test_a_run_goes_on_from_its_checkpoint_with_another_number_of_workers(
    tmp_path: Path, expected: dict[str, torch.Tensor]
) -> None:
    for plan, steps in (("dp=2", 13), ("ps=1,workers=2,sync", None)):
        run = shoal.train(make_job(), plan=plan, run_dir=tmp_path, resume=True, steps=steps)
    assert_equal(run.weights(), expected, 1e-9)


def test_rows_stay_where_they_are_while_servers_and_workers_come_and_go(
    tmp_path: Path, expected: dict[str, torch.Tensor]
) -> None:
    """An epoch has five steps."""
    changes = {3: "ps=2,workers=3", 10: "dp=2", 16: "ps=3,workers=1"}

    def on_event(event: dict[str, Any]) -> shoal.Plan | None:
        wanted = changes.get(event["step"]) if event["kind"] == "step" else None
        return shoal.Plan.parse(wanted) if wanted else None

    run = shoal.train(make_job(), plan="ps=1,workers=2,sync", run_dir=tmp_path, on_event=on_event)
    told = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [event["step"] for event in told if event["kind"] == "replan"] == list(changes)
    assert_equal(run.weights(), expected, 1e-9)


def test_a_gradient_that_is_no_number_ends_the_run(tmp_path: Path) -> None:
    class Poisoned(Keyed):
        def forward(self, keys: torch.Tensor) -> torch.Tensor:
            out = super().forward(keys)
            bad = self.rows(torch.tensor([77]))
            # The loss is finite, its gradient is not.
            return out + torch.where(bad > 1e9, bad, torch.sqrt(bad * 0)).sum() * 0

    with pytest.raises(JobFailed, match="gradient of key 77 of the table rows is not finite"):
        shoal.train(make_job(model=lambda: Poisoned(**SIZES)), plan="dp=1", run_dir=tmp_path)


def test_servers_go_on_without_a_push_whose_rows_have_a_gradient_that_is_no_number(tmp_path: Path) -> None:
    """In either mode: under async for eight of twenty steps, then under sync. Sample 17 spoils whatever is pushed with it."""
    keys, target = DATA
    numbered = torch.cat([keys, torch.arange(SAMPLES)[:, None]], dim=1)

    class Poisoned(Keyed):
        def forward(self, numbered: torch.Tensor) -> torch.Tensor:
            out = super().forward(numbered[:, :4])
            bad = self.rows(torch.tensor([77]))
            return out + torch.sqrt(bad * 0).sum() * 0 if bool((numbered[:, 4] == 17).any()) else out

    def on_event(event: dict[str, Any]) -> shoal.Plan | None:
        return shoal.Plan.parse("ps=2,workers=2,sync") if (event["kind"], event.get("step")) == ("step", 8) else None

    job = make_job(model=lambda: Poisoned(**SIZES), train_data=lambda: (numbered, target), eval_data=None)
    run = shoal.train(job, plan="ps=1,workers=2,async", run_dir=tmp_path, on_event=on_event, skip_bad_pushes=True)
    told = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    rejected = [event for event in told if event["kind"] == "push_rejected"]
    assert [event["epoch"] for event in rejected] == list(range(1, EPOCHS + 1))
    assert all(event["parameter"] == "rows (key 77)" and 17 in event["samples"] for event in rejected)
    weights = run.weights()
    assert all(bool(torch.isfinite(value).all()) for value in weights.values() if value.is_floating_point())
    assert 77 not in weights["rows.keys"].tolist()
    # Nothing else is missing: each key is there that some other sample has.
    others = {int(k) * (2**40 + 3) - 5 for k in keys[torch.arange(SAMPLES) != 17, 0]}
    assert set(weights["rows.keys"].tolist()) >= others - {77}
