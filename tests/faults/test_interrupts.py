"""Ctrl-C and SIGTERM, by the command line: once, twice, and before anything has begun; and workers that hang."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import noisy_job
import pytest
import torch
from noisy_job import command, digest, environment, events, gone, make_job, processes, wait_until
from torch import nn

import shoal

PLAN = "dp=2,threads=1"


def start(run: Path, *more: str, target: str = "job") -> subprocess.Popen[str]:
    return subprocess.Popen(
        command(run, *more, target=target), env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip


def has_steps(run: Path) -> bool:
    """Whether steps are being made; events of steps reach the file a little later, checkpoints at once."""
    return bool(events(run, "checkpoint"))


def interrupted(run: Path, number: int, *more: str) -> dict[str, Any]:
    """Train, stop by one signal, and return what --json says."""
    process = start(run, *more)
    wait_until(lambda: has_steps(run), process)
    family = processes(run)
    process.send_signal(number)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    assert gone(family)
    assert "--resume" in err and str(run) in err
    assert "Traceback" not in err
    answer: dict[str, Any] = json.loads(out)
    return answer


def test_interrupted_and_resumed(tmp_path: Path) -> None:
    run = tmp_path / "run"
    # More epochs than it will make before it is stopped; the second half of the test gives the true number.
    first = interrupted(run, signal.SIGINT, "--epochs", "1000")
    stop = events(run, "stop")[-1]
    assert (stop["reason"], stop["step"]) == ("interrupt", first["steps"])
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    assert int(newest.name.partition("-")[2]) == first["steps"], "the stop itself is a checkpoint"
    assert processes(run) == []

    rest = subprocess.Popen(
        command(run, "--resume", "--epochs", "1000"), env=environment(), stdout=-3, stderr=subprocess.PIPE, text=True
    )
    wait_until(lambda: len(events(run, "run_start")) == 2, rest)
    wait_until(lambda: events(run, "checkpoint")[-1]["step"] > first["steps"], rest)
    rest.send_signal(signal.SIGTERM)
    assert rest.wait(timeout=100) == 0
    assert rest.stderr is not None and "--resume" in rest.stderr.read()
    rest.stderr.close()
    steps = events(run, "stop")[-1]["step"]
    assert steps > first["steps"]

    # Twice stopped and gone on with, it is where an undisturbed run is after as many steps.
    stopped = shoal.open(run)
    whole = shoal.train(noisy_job.job, plan=PLAN, run_dir=tmp_path / "whole", epochs=1000, steps=steps)
    assert digest(stopped) == digest(whole)


def test_second_interrupt_leaves_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A step that takes an hour, so that the first Ctrl-C has something to wait for.
    monkeypatch.setenv("SHOAL_FAULTS", "slow(rank=1,factor=1000000,step=5)")
    process = start(tmp_path / "run")
    wait_until(lambda: any(e["step"] == 5 for e in events(tmp_path / "run", "step")), process)
    family = processes(tmp_path / "run")
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None, "the step is not over"
    for _ in range(3):
        # Two signals that arrive while a process has no time to run are one.
        process.send_signal(signal.SIGINT)
        with contextlib.suppress(subprocess.TimeoutExpired):
            out, err = process.communicate(timeout=60)
            break
    assert process.returncode == 130 and gone(family)
    assert err.strip().splitlines()[-1] == "Interrupted." and "Traceback" not in err
    assert json.loads(out) == {"error": "Interrupted.", "exit_code": 130}


def test_interrupt_while_starting(tmp_path: Path) -> None:
    run = tmp_path / "run"
    process = start(run, target="unending")
    wait_until(run.exists, process)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=100)
    assert process.returncode == 130
    assert err.strip().splitlines()[-1] == "Interrupted." and "Traceback" not in err
    # Nothing that would be in the way of the same command once more.
    assert not run.exists()


# -- stalls ----------------------------------------------------------------------------------------------------------


def sleepy(folder: Path) -> Any:
    """A loss that falls asleep once, and once never comes back from its loop, each in one worker only."""

    def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            calls = folder / "calls"
            with open(calls, "a") as file:
                file.write("x")
            if calls.stat().st_size >= 9:
                doze()
            if calls.stat().st_size >= 40:
                spin()
        return nn.functional.cross_entropy(output, target)

    def once(name: str) -> bool:
        try:
            (folder / name).touch(exist_ok=False)
            return True
        except FileExistsError:
            return False

    def doze() -> None:
        if once("dozed"):
            time.sleep(1000)

    def spin() -> None:
        if once("spun"):
            while True:
                pass

    return loss


def test_a_worker_that_hangs_in_user_code_is_named_and_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOAL_EXPORT", "0")
    calm = shoal.train(make_job(epochs=3), plan=PLAN, run_dir=tmp_path / "calm")
    monkeypatch.setenv("SHOAL_STALL_S", "4")
    monkeypatch.setenv("SHOAL_FAULTS", "slow(rank=0,factor=3)")
    run = shoal.train(make_job(loss=sleepy(tmp_path), epochs=3), plan=PLAN, run_dir=tmp_path / "run")

    assert digest(run) == digest(calm)
    stalls = events(run.path, "stall")
    for name in ("doze", "spin"):
        (stall,) = [e for e in stalls if f" in {name}" in e["stack"]]
        assert stall["phase"] == "forward" and Path(__file__).name in stall["stack"]
        death = next(e for e in events(run.path, "death") if e["pid"] == stall["pid"])
        assert (death["rank"], death["step"], death["cause"]) == (stall["rank"], stall["step"], "stalled")
        recovered = events(run.path, "recovered")
        back = next(e for e in recovered if (e["rank"], e["step"]) == (stall["rank"], stall["step"]))
        assert back["pid"] != stall["pid"]
