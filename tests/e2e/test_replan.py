"""``shoal replan``: a running run gets another plan, and says no to what makes no sense."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from noisy_job import environment, events, processes, wait_until

from shoal.cli.main import main

JOB = """
import time, torch, shoal
from torch import nn

def loss(output, target):
    time.sleep(0.02)
    return nn.functional.mse_loss(output, target)

job = shoal.Job(
    name="slow", model=lambda: nn.Linear(4, 1), train_data=lambda: (torch.ones(400, 4), torch.ones(400, 1)), loss=loss,
    optimizer=lambda params: torch.optim.SGD(params, lr=0.01), batch_size=8, epochs=10_000,
)
"""


def test_a_running_run_gets_another_plan(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "slow.py").write_text(JOB)
    run = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "shoal", "train", f"{tmp_path}/slow.py:job", "--plan", "ps=1,workers=1,sync,threads=1",
         "--run", str(run), "--json"], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        wait_until(lambda: events(run, "step"), process)
        for plan, sentence in (
            ("ps=5000", "is more servers than parameters"),
            ("auto", "Say what is to change"),
            ("threads=1", "already"),
            ("workers=3", "belongs to a parameter server"),
            ("device=cuda", "cannot change while a run is under way"),
            ("dp=9", "9 workers cannot share a batch of 8"),
        ):
            assert main(["replan", str(run), "--plan", plan]) == 2
            assert sentence in capfd.readouterr().err.splitlines()[-1]
        assert not events(run, "replan") and process.poll() is None

        assert main(["replan", str(run), "--plan", "ps=2,workers=2", "--json"]) == 0
        told = json.loads(capfd.readouterr().out)
        (event,) = events(run, "replan")
        assert {k: event[k] for k in ("step", "before", "plan", "pause_s")} == {k: v for k, v in told.items() if k != "run"}
        assert event["by"] == "command" and len(processes(run, "server")) == len(processes(run, "worker")) == 2
        assert main(["runs", str(run), "--json"]) == 0
        assert json.loads(capfd.readouterr().out)["runs"][0]["plan"] == told["plan"]
        wait_until(lambda: events(run, "step")[-1]["step"] > told["step"] + 3, process)
    finally:
        # Not by its number: where it has ended already, that may be somebody else's by now.
        process.send_signal(signal.SIGTERM)
        out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and json.loads(out)["plan"] == told["plan"], err
    steps = [e["step"] for e in events(run, "step")]
    assert steps == list(range(1, json.loads(out)["steps"] + 1))
    assert main(["replan", str(run), "--plan", "dp=2"]) == 2
    assert "is not running; go on with it" in capfd.readouterr().err
