"""``--memory-limit``: a model that one worker cannot hold is refused, and trains under the plan that the refusal proposes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from shoal.cli.main import main
from shoal.plan import Plan

FILE = """
import torch
import shoal

WIDTH = 1024


def data():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(64, WIDTH, generator=generator), torch.randint(0, 10, (64,), generator=generator)


def net():
    layers = [part for _ in range(20) for part in (torch.nn.Linear(WIDTH, WIDTH), torch.nn.ReLU())]
    return torch.nn.Sequential(*layers, torch.nn.Linear(WIDTH, 10))


large = shoal.Job(
    name="large", model=net, train_data=data, loss=torch.nn.functional.cross_entropy, optimizer=torch.optim.Adam,
    batch_size=16,
)
"""
WEIGHTS_MB = 20 * 1024 * 1025 * 4 / 1e6


def mb(number: str, unit: str) -> float:
    return float(number.replace(",", "")) * {"MB": 1, "GB": 1000}[unit]


def test_what_one_worker_cannot_hold_trains_under_the_plan_that_is_proposed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "jobs.py").write_text(FILE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SHOAL_EXPORT", "0")

    def refused(*words: str) -> str:
        assert main(["train", "jobs.py:large", *words]) == 2
        out, err = capfd.readouterr()
        assert out == "" and "Traceback" not in err
        assert sorted(p.name for p in tmp_path.iterdir() if p.name != "__pycache__") == ["jobs.py"]
        return err.rstrip("\n").splitlines()[-1]

    def trained(*words: str) -> Any:
        assert main(["train", "jobs.py:large", *words, "--epochs", "3", "--json"]) == 0
        out, err = capfd.readouterr()
        return json.loads(out), err

    # What the process itself takes depends on the machine; the rest follows from the model.
    hopeless = refused("--plan", "dp=1", "--memory-limit", "50MB")
    assert "no plan with up to" in hopeless
    whole, process = (re.search(rf"{word} ([\d.,]+) (MB|GB)", hopeless) for word in ("about", "process"))
    assert whole is not None and process is not None
    own = mb(*process.groups())  # type: ignore[arg-type]
    assert mb(*whole.groups()) - own == pytest.approx(4 * WEIGHTS_MB, rel=0.2)  # type: ignore[arg-type]

    limit = f"{own + 0.8 * 4 * WEIGHTS_MB:.0f}MB"
    sentence = refused("--plan", "dp=1", "--memory-limit", limit)
    proposed = re.search(r"--plan (\S+) would fit with", sentence)
    assert proposed is not None, sentence
    assert Plan.parse(proposed[1]).world_size == 2

    told, shown = trained("--plan", proposed[1], "--memory-limit", limit)
    assert told["steps"] == 12 and told["world_size"] == 2
    assert told["memory_mb"] <= mb(limit[:-2], "MB")
    assert told["predicted_memory_mb"] == pytest.approx(told["memory_mb"], rel=0.15)
    assert "memory of the largest worker: predicted" in shown

    # Left to itself, shoal takes what it would propose.
    auto, _ = trained("--memory-limit", limit)
    assert Plan.parse(auto["plan"]).world_size == 2 and auto["memory_mb"] <= mb(limit[:-2], "MB")
