"""Runs with torch.compile: the weights of runs without, the same bits again, and unharmed by kill -9."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from plain_torch import assert_equal
from torch import nn

import shoal
from shoal.errors import PlanError

pytestmark = pytest.mark.skipif(shutil.which("g++") is None, reason="no C++ compiler")
STEPS = 6
PLAN = "dp=2,threads=1,rewrites=none"


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Dropout(0.0), nn.Linear(16, 5)).double()


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    # The last batch of an epoch has 7 samples.
    return torch.randn(47, 12, dtype=torch.float64, generator=generator), torch.arange(47) % 5


def job() -> shoal.Job:
    return shoal.Job(
        name="compiled", model=model, train_data=data, eval_data=data, loss=nn.functional.cross_entropy,
        optimizer=lambda params: torch.optim.Adam(params, lr=1e-3), batch_size=20, epochs=2,
    )  # fmt: skip


def test_compiled_runs_equal_those_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_EXPORT", "0")
    truth = shoal.train(job(), plan=PLAN, run_dir=tmp_path / "written", steps=STEPS)
    assert "compile=off" in str(truth.plan)
    # Without a word about workers: they are chosen as ever.
    assert shoal.plan(job(), wanted="compile=on,layout=contiguous").compile
    run = shoal.train(job(), plan=f"{PLAN},compile=on", run_dir=tmp_path / "compiled", steps=STEPS)
    assert "compile=on" in str(run.plan)
    assert "compile=on (torch.compile)" in (run.path / "plan.toml").read_text(encoding="utf-8")
    assert_equal(run.weights(), truth.weights(), within=1e-9)
    assert run.history[-1]["eval_loss"] == pytest.approx(truth.history[-1]["eval_loss"], rel=1e-9)
    assert run.model().state_dict().keys() == model().state_dict().keys()
    # Killed in the ragged batch, where a replacement begins, and once more in a whole one.
    monkeypatch.setenv("SHOAL_FAULTS", "kill(rank=1,step=2,phase=backward);kill(rank=0,step=4,phase=forward)")
    again = shoal.train(job(), plan=str(run.plan), run_dir=tmp_path / "killed", steps=STEPS)
    assert len([e for e in (again.path / "events.jsonl").read_text().splitlines() if '"death"' in e]) == 2
    assert all(torch.equal(again.weights()[name], value) for name, value in run.weights().items())


def test_where_nothing_can_be_compiled_a_sentence_says_so(tmp_path: Path) -> None:
    for plan, sentence in (
        ("pp=2", "compile=on cannot be used: torch.compile takes whole models, and this plan cuts it"),
        ("dp=2,zero=3", "compile=on cannot be used: torch.compile takes whole models"),
        ("tp=2", "compile=on cannot be used: torch.compile takes whole models"),
        ("dp=1,recompute=full", "compile=on cannot be used: recompute=full runs"),
        ("dp=1,rewrites=flatten", "compile=on cannot be used: rewrites=flatten makes other code"),
    ):
        with pytest.raises(PlanError, match=sentence):
            shoal.train(job(), plan=f"{plan},compile=on", run_dir=tmp_path / "refused", steps=1)
