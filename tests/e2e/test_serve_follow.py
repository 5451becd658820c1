"""A service that follows a run in training ends with the run's own answers, and nobody who asked was left without."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
import pytest
import torch

import shoal
from shoal import bundle
from shoal.errors import TargetError
from shoal.serve.follow import describes, newest

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
    subprocess.run([*train, "--run", "first"], cwd=tmp_path, check=True, capture_output=True, timeout=250)
    subprocess.run([*train, "--run", "second", "--steps", "3"], cwd=tmp_path, check=True, capture_output=True, timeout=250)
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


def _versions(url: str) -> list[str]:
    with urllib.request.urlopen(f"{url}/v2/models/followed", timeout=60) as answer:
        found: list[str] = json.load(answer)["versions"]
    return found


def _right(directory: Path, rows: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        found: np.ndarray = bundle.load(directory)(torch.from_numpy(rows)).numpy()
    return found


def _until(true: object) -> None:
    deadline = time.monotonic() + 60
    while not true():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_run_that_has_nothing_yet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not ready, and why, until the first checkpoint; then its answers, and at last the finished model's."""
    monkeypatch.setenv("SHOAL_CHECKPOINT_S", "0")
    monkeypatch.setenv("SHOAL_EXPORT", "0")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    (tmp_path / "followed.py").write_text(_JOB)
    train = [sys.executable, "-m", "shoal", "train", "followed.py:job", "--plan", "dp=1,threads=1", "--run", "run"]
    # Several epochs, so that there is a checkpoint on the way: the first of them says how the model is built.
    subprocess.run([*train, "--epochs", "20"], cwd=tmp_path, check=True, capture_output=True, timeout=240)
    run, aside = tmp_path / "run", tmp_path / "aside"
    assert describes(run)
    # As it was when it had just begun.
    aside.mkdir()
    for name in ("model", "checkpoints"):
        (run / name).rename(aside / name)
    rows = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32)
    command = [sys.executable, "-m", "shoal", "serve", "--follow", "run", "--slo-ms", "20000", "--replicas", "1"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, text=True, stderr=subprocess.DEVNULL) as service:
        try:
            assert service.stdout is not None
            where = json.loads(service.stdout.readline())
            assert where["models"] == ["followed"]
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(f"{where['url']}/v2/health/ready", timeout=60)
            assert refused.value.code == 503 and "followed: its run has no checkpoint yet" in refused.value.read().decode()
            client = shoal.Client(where["url"])
            (aside / "checkpoints").rename(run / "checkpoints")
            latest = newest(run)
            assert latest is not None
            _until(lambda: client.ready())
            with torch.no_grad():
                right = bundle.load_with(run / "checkpoints", latest)(torch.from_numpy(rows)).numpy()
            np.testing.assert_allclose(client.infer(rows)["output"], right, rtol=1e-5, atol=1e-5)
            (aside / "model").rename(run / "model")
            _until(lambda: _versions(where["url"]) == ["2"])
            np.testing.assert_allclose(client.infer(rows)["output"], _right(run / "model", rows), rtol=1e-5, atol=1e-5)
        finally:
            service.terminate()
            service.wait(60)
