"""Runs with rewritten models end with the weights of runs as the author wrote them, and the plan says what was done."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from plain_torch import assert_equal
from torch import nn

import shoal
from shoal.errors import PlanError
from shoal.kernels.onednn import available

STEPS = 10


def model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(8, 16, 3), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(64, 5),
    ).double()  # fmt: skip


def data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    return torch.randn(61, 3, 14, 14, dtype=torch.float64, generator=generator), torch.arange(61) % 5


def job() -> shoal.Job:
    return shoal.Job(
        name="rewritten", model=model, train_data=data, eval_data=data, loss=nn.functional.cross_entropy,
        optimizer=lambda params: torch.optim.Adam(params, lr=1e-3), batch_size=20, epochs=4,
    )  # fmt: skip


def test_rewritten_runs_equal_those_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_EXPORT", "0")

    def weights(plan: str, wanted: shoal.Job | None = None) -> dict[str, torch.Tensor]:
        run = shoal.train(wanted or job(), plan=plan, run_dir=tmp_path / str(len(list(tmp_path.iterdir()))), steps=STEPS)
        assert ("rewrites=none" in str(run.plan)) == ("rewrites=none" in plan)
        return run.weights()

    names = "conv_pool+relu_pool+flatten"
    fixed = "dp=2,threads=1,layout=channels_last"
    truth = weights(f"{fixed},rewrites=none")
    # The names are in the order in which they are applied, whatever order they are given in.
    run = shoal.train(job(), plan=f"{fixed},rewrites=flatten+conv_pool+relu_pool", run_dir=tmp_path / "named", steps=STEPS)
    assert f"rewrites={names}" in str(run.plan)
    assert_equal(run.weights(), truth, within=1e-9)
    assert run.model().state_dict().keys() == model().state_dict().keys()
    again = shoal.train(job(), plan=str(run.plan), run_dir=tmp_path / "again", steps=STEPS).weights()
    assert all(torch.equal(again[name], value) for name, value in run.weights().items())
    pieces = "dp=2,threads=1,layout=channels_last,sub_batch=4"
    micro = weights(f"{pieces},rewrites=none")
    assert_equal(weights(f"{pieces},rewrites={names}"), micro, within=1e-9)
    # Without BatchNorm pieces change nothing.
    plain = job().replace(name="plain", model=lambda: nn.Sequential(*(m for m in model() if not isinstance(m, nn.BatchNorm2d))))
    whole = weights("dp=1,threads=1,layout=channels_last,sub_batch=0,rewrites=none", plain)
    assert_equal(weights(f"{pieces},rewrites={names}", plain), whole, within=1e-9)
    auto = shoal.train(plain, plan="dp=1,threads=1,rewrites=auto", run_dir=tmp_path / "auto", steps=STEPS)
    assert "auto" not in str(auto.plan)
    assert "for 20 samples on one thread" in (auto.path / "plan.toml").read_text(encoding="utf-8")
    assert_equal(auto.weights(), whole, within=1e-9)


class Residual(nn.Module):
    """3 × 3 convolutions, BatchNorm over the global batch, a shortcut."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.conv, self.norm = nn.Conv2d(3, 16, 3), nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.last, self.head = nn.BatchNorm2d(16), nn.Linear(16, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        y = torch.relu(self.norm(self.conv(x)))
        y = torch.relu(self.last(self.conv(y)) + x)
        return self.head(y.mean((2, 3)))


def test_convolutions_and_norms_of_our_own_under_several_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_EXPORT", "0")
    residual = job().replace(name="residual", model=lambda: Residual().double())
    runs = [
        shoal.train(residual, plan=f"dp={dp},threads=1,layout={layout},rewrites={names}", run_dir=tmp_path / f"{k}", steps=STEPS)
        for k, (dp, layout, names) in enumerate(
            [(1, "contiguous", "none"), (2, "channels_last", "none"), (2, "channels_last", "winograd+norm_relu")]
        )
    ]
    for run in runs[1:]:
        assert_equal(run.weights(), runs[0].weights(), within=1e-9)


def text_job() -> shoal.Job:
    generator = torch.Generator().manual_seed(3)
    return shoal.Job(
        name="multiplying", model=lambda: nn.Sequential(nn.Linear(256, 256), nn.GELU(), nn.Linear(256, 256), nn.Linear(256, 4)),
        train_data=lambda: (torch.randn(192, 256, generator=generator), torch.arange(192) % 4), batch_size=96,
        loss=nn.functional.cross_entropy, optimizer=lambda params: torch.optim.SGD(params, lr=0.05), epochs=3,
    )  # fmt: skip


@pytest.mark.timeout(240)
@pytest.mark.skipif(not available(), reason="this torch was built without oneDNN")
def test_products_by_onednn_under_plans_that_cut_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_EXPORT", "0")
    truth = shoal.train(text_job(), plan="dp=1,threads=1,rewrites=none", run_dir=tmp_path / "truth", steps=6)
    for plan in ("tp=2,threads=1", "dp=2,zero=3,threads=1", "dp=1,threads=1,recompute=full"):
        whole = f"{plan},rewrites=onednn_matmul"
        run = shoal.train(text_job(), plan=whole, run_dir=tmp_path / plan, steps=6)
        assert "rewrites=onednn_matmul" in str(run.plan)
        assert_equal(run.weights(), truth.weights(), within=1e-5)
        # Another order of adding up: it was oneDNN that multiplied.
        assert not all(torch.equal(run.weights()[name], value) for name, value in truth.weights().items())


def test_names_that_cannot_be_used_are_refused_in_a_sentence(tmp_path: Path) -> None:
    linear = job().replace(model=lambda: nn.Sequential(nn.Flatten(), nn.Linear(3 * 14 * 14, 5)).double())
    for plan, sentence in (
        ("dp=1,rewrites=relu_pool", "The rewrite relu_pool finds nothing to change in this model; leave it out of the plan."),
        ("dp=1,rewrites=flaten", 'There is no rewrite "flaten"'),
        ("dp=2,tp=1,zero=3,rewrites=flatten", "rewrites=flatten cannot be used: they change whole models"),
        ("tp=2,rewrites=onednn_matmul+flatten", "rewrites=flatten cannot be used: they change whole models"),
        ("pp=2,sub_batch=2", "sub_batch=2 does not go with a pipeline"),
    ):
        with pytest.raises(PlanError, match=sentence.split("(")[0]):
            shoal.train(linear, plan=plan, run_dir=tmp_path / "refused", steps=1)
