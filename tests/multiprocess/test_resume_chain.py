"""A run that is gone on with under one plan after the other, and what is left of it: all as if one worker had done it."""

from __future__ import annotations

from pathlib import Path

import noisy_job
import numpy as np
import pytest
import torch
from noisy_job import events, history
from torch import nn

import shoal
from shoal.observe.compare import max_rel_diff

PLANS = [
    ("dp=2,threads=1", 5),
    ("tp=2,threads=1", 12),
    ("dp=3,zero=3,threads=1", 19),
    ("pp=2,microbatches=2,threads=1", None),
]


class Ramp:
    """A schedule's factor that is an object, which its state_dict carries along."""

    def __init__(self) -> None:
        self.longest = 40

    def __call__(self, step: int) -> float:
        # A NumPy number, as often comes of such a formula: so are the learning rates then.
        return np.float64(1 - step / self.longest if step < self.longest else 0.1)


def model() -> nn.Module:
    return nn.Sequential(
        nn.Linear(12, 34), nn.Tanh(), nn.Linear(34, 16), nn.Tanh(), nn.Linear(16, 2)
    ).double()  # fmt: skip


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(101, 12, generator=generator, dtype=torch.float64)
    return x, (x.sum(1) > 0).long()


JOB = shoal.Job(
    name="steady",
    model=model,
    train_data=data,
    eval_data=data,
    loss=nn.functional.cross_entropy,
    optimizer=noisy_job.adam,
    scheduler=lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, Ramp()),
    metrics={
        "accuracy": lambda output, target: (output.argmax(1) == target).double().mean(),
        "auc": noisy_job.Auc(),
        "confusion": noisy_job.Confusion(),
    },
    batch_size=10,
    epochs=3,
    grad_clip=0.3,
)


def test_one_plan_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_EXPORT", "0")
    whole = shoal.train(JOB, plan="dp=1,threads=1", run_dir=tmp_path / "whole")
    run = tmp_path / "run"
    for number, (plan, steps) in enumerate(PLANS):
        gone_on = shoal.train(JOB, plan=plan, run_dir=run, resume=number > 0, steps=steps)
        assert steps is None or (gone_on.history[-1].get("partial", False), gone_on.summary()["steps"]) == (True, steps)
        # Whatever the plan, the plain state_dict.
        assert [(n, w.shape) for n, w in gone_on.weights().items()] == [(n, w.shape) for n, w in whole.weights().items()]
        checkpoint = run / "checkpoints" / f"step-{gone_on.summary()['steps']:08d}" / "state.safetensors"
        assert _header(checkpoint) == _header(sorted((tmp_path / "whole" / "checkpoints").glob("step-*/state*"))[-1])
    assert [e["resumed_from"] for e in events(run, "run_start")] == [None, 5, 12, 19]
    assert max_rel_diff(whole.weights(), gone_on.weights()) <= 1e-9
    for one, other in zip(history(whole), history(gone_on), strict=True):
        assert one == pytest.approx(other, rel=1e-9)


def _header(path: Path) -> bytes:
    """Names, shapes and places of the tensors in a checkpoint."""
    content = path.read_bytes()
    return content[: 8 + int.from_bytes(content[:8], "little")]


def test_what_a_split_run_leaves_behind(tmp_path: Path) -> None:
    run = shoal.train(JOB, plan="tp=2,threads=1", run_dir=tmp_path / "run", epochs=1)
    last = run.history[-1]
    found = run.evaluate()
    assert found["eval_loss"] == pytest.approx(last["eval_loss"], rel=1e-9)
    assert found["eval_auc"] == pytest.approx(last["eval_auc"], rel=1e-9)
    x = data()[0]
    built = run.model().eval()(x)
    loaded = shoal.load(run.path / "model")
    exported = torch.export.load(run.path / "model" / "program.pt2").module()
    assert torch.equal(loaded.eval()(x) if isinstance(loaded, nn.Module) else loaded(x), built)
    torch.testing.assert_close(exported(x), built)
