"""Plans with device=cuda: what is kept on the device and what is not, with the processor in the GPU's place."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import model_zoo as zoo
import pytest
import torch

import shoal
from shoal.errors import PlanError
from shoal.observe.compare import max_rel_diff
from shoal.observe.events import read_events


@pytest.fixture(autouse=True)
def _no_export(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("SHOAL_EXPORT", "0")
    return


def test_a_device_plan_goes_on_where_a_processors_has_stopped_and_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = zoo.job("resnet", torch.float64, eval_data=None)
    alone = shoal.train(job, plan="dp=1,threads=1", run_dir=tmp_path / "alone", steps=9)
    monkeypatch.setenv("SHOAL_DEVICE_PRETEND", "cpu")
    run = tmp_path / "run"
    shoal.train(job, plan="dp=1,threads=1", run_dir=run, steps=3)
    shoal.train(job, plan="dp=2,zero=1,threads=1,device=cuda", run_dir=run, resume=True, steps=5)
    # The directory's own plan: on the device again.
    shoal.train(job, run_dir=run, resume=True, steps=7)
    found = shoal.train(job, plan="dp=1,threads=1", run_dir=run, resume=True, steps=9)
    assert max_rel_diff(alone.weights(), found.weights()) < 1e-9
    starts = list(read_events(run / "events.jsonl", ["run_start"]))
    assert ["device=cuda" in event["plan"] for event in starts] == [False, True, True, False]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_sentence_says_so(tmp_path: Path) -> None:
    for ask in (
        lambda job: shoal.train(job, plan="device=cuda", run_dir=tmp_path / "run"),
        lambda job: shoal.plan(job, wanted="device=cuda"),
    ):
        with pytest.raises(PlanError, match="device=cuda needs "):
            ask(zoo.job("odd", torch.float32))
    assert not (tmp_path / "run").exists()
