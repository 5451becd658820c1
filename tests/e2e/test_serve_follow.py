"""A service that follows a run in training ends with the run's own answers, and nobody who asked was left without."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import shoal
from shoal import bundle
from shoal.errors import TargetError
from shoal.serve.follow import newest

_JOB = """\
import torch
import shoal


def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(96, 6, generator=generator)
    return x, (x.sum(1) > 0).long()


def model():
    net = torch.nn.Sequential(torch.nn.Linear(6, 12), torch.nn.BatchNorm1d(12), torch.nn.Linear(12, 6), torch.nn.Linear(6, 12))
    net[3].weight = net[0].weight
    return net


job = shoal.Job(name="followed", model=model, train_data=data, loss=torch.nn.functional.cross_entropy,
                optimizer=lambda params: torch.optim.SGD(params, lr=0.05), batch_size=16, epochs=1)
"""


def test_follows_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_CHECKPOINT_S", "0")
    monkeypatch.setenv("SHOAL_EXPORT", "0")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    (tmp_path / "followed.py").write_text(_JOB)
    train = [sys.executable, "-m", "shoal", "train", "followed.py:job", "--plan", "dp=1,threads=1"]
    subprocess.run([*train, "--run", "first"], cwd=tmp_path, check=True, capture_output=True, timeout=120)
    subprocess.run([*train, "--run", "second", "--steps", "3"], cwd=tmp_path, check=True, capture_output=True, timeout=120)
    second = tmp_path / "second"
    finished = (second / "model").rename(tmp_path / "finished")
    rows = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    said: list[str] = []
    with shoal.serve(tmp_path / "first", slo_ms=20_000, replicas=1) as service:
        client = shoal.Client(service.url)

        def answer() -> np.ndarray:
            return client.infer(rows)["output"]

        np.testing.assert_allclose(answer(), _right(tmp_path / "first" / "model", rows), rtol=1e-5, atol=1e-5)
        with pytest.raises(TargetError, match="not the directory of a run"):
            service.follow("followed", tmp_path)
        service.follow("followed", second, said.append)
        latest = newest(second)
        assert latest is not None and latest.parent.name == "checkpoints"
        _until(lambda: len(said) == 1)
        assert said[0].endswith(f"{latest.name} answers now.")
        with torch.no_grad():
            right = bundle.load_with(tmp_path / "first" / "model", latest)(torch.from_numpy(rows)).numpy()
        np.testing.assert_allclose(answer(), right, rtol=1e-5, atol=1e-5)
        finished.rename(second / "model")
        _until(lambda: len(said) == 2)
        assert said[1].endswith("the finished model answers now.")
        np.testing.assert_allclose(answer(), _right(second / "model", rows), rtol=1e-5, atol=1e-5)


def _right(directory: Path, rows: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        found: np.ndarray = bundle.load(directory)(torch.from_numpy(rows)).numpy()
    return found


def _until(true: object) -> None:
    deadline = time.monotonic() + 60
    while not true():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.02)
