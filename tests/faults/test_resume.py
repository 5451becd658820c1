"""kill -9 of the supervisor, damaged checkpoints and full disks: what is resumed ends as if nothing had happened."""

from __future__ import annotations

import contextlib
import json
import os
import random
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import noisy_job
import pytest
from noisy_job import command, digest, environment, events, gone, held_at, make_job, processes, settle, wait_until

import shoal

PLAN = "dp=2,threads=1"
# Of the workers that share the batch, each is a team that shares the model.
SPLIT = ("--plan", "dp=2,tp=2,threads=1", "--epochs", "4")
ROOT = Path(shoal.__file__).parents[1]


@pytest.fixture(autouse=True)
def _settings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_EXPORT", "0")


def train(run: Path, *more: str) -> dict[str, Any]:
    """Train by the command line; what --json says."""
    done = subprocess.run(command(run, *more), env=environment(), capture_output=True, text=True, timeout=250)
    assert done.returncode == 0, done.stderr
    answer: dict[str, Any] = {**json.loads(done.stdout), "stderr": done.stderr}
    return answer


def killed_after(run: Path, checkpoint: int, pause_s: float, *more: str) -> None:
    """Train, and kill -9 the supervisor some time after a checkpoint of at least this step, and before the 40th."""
    env = environment(SHOAL_FAULTS=held_at(checkpoint + 18, 1))
    with subprocess.Popen(command(run, *more), env=env, stdout=-3, stderr=-3) as process:
        try:
            wait_until(lambda: any(e["step"] >= checkpoint for e in events(run, "checkpoint")), process)
            family = processes(run)
            assert process.pid in family and len(family) >= 4
            time.sleep(pause_s)
            assert process.poll() is None
        finally:
            process.kill()
            process.wait()
    wait_until(lambda: gone(family))


def shared_memory() -> set[str]:
    return set(os.listdir("/dev/shm"))


def test_killed_supervisor_and_damaged_checkpoint(tmp_path: Path) -> None:
    calm = train(tmp_path / "calm", *SPLIT)
    run, choose, before = tmp_path / "run", random.Random(3), shared_memory()

    killed_after(run, 1, 0.1 * choose.random(), *SPLIT)
    newest = sorted((run / "checkpoints").glob("step-*"))[-1]
    first = int(newest.name.partition("-")[2])
    killed_after(run, first + 1, 0.1 * choose.random(), "--resume", *SPLIT)
    assert shared_memory() <= before

    kept = sorted((run / "checkpoints").glob("step-*"))
    assert len(kept) >= 2
    weights = kept[-1] / "state.safetensors"
    with open(weights, "r+b") as file:
        file.seek(weights.stat().st_size // 2)
        flipped = bytes(byte ^ 0xFF for byte in file.read(8))
        file.seek(-8, os.SEEK_CUR)
        file.write(flipped)
    resumed = train(run, "--resume", *SPLIT)

    assert resumed["weights_sha256"] == calm["weights_sha256"]
    for one, other in zip(resumed["epochs"], calm["epochs"], strict=True):
        assert {"loss", "auc", "confusion_3", "eval_auc"} <= set(one)
        assert {**one, "samples_per_s": 0} == {**other, "samples_per_s": 0}
    (damage,) = events(run, "checkpoint_damaged")
    assert damage["path"] == str(kept[-1]) and "state.safetensors" in damage["reason"]
    assert kept[-1].name in resumed["stderr"]
    starts = [e["resumed_from"] for e in events(run, "run_start")]
    assert starts[0] is None and starts[1] >= first and starts[2] == int(kept[-2].name.partition("-")[2])
    assert processes(run) == []
    assert not list((run / "checkpoints").glob(".part-*"))


# -- a full disk -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def small_disk(path: Path, megabytes: int) -> Iterator[Path]:
    """A file system with so much room, for whoever may make one."""
    path.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "none", str(path)], capture_output=True)
    if made.returncode:
        pytest.skip("mounting a file system needs root")
    try:
        yield path
    finally:
        subprocess.run(["umount", "--lazy", str(path)], check=True)


@pytest.mark.skipif(sys.platform != "linux", reason="mounts a tmpfs")
def test_full_disk_costs_the_newest_checkpoint_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_CHECKPOINT_S", "0")
    # Weights and two states of Adam: 8 MB a checkpoint. Two of them and the model fit, three do not.
    ballast = "ballast"

    def fill(event: dict[str, Any]) -> None:
        if event["kind"] == "checkpoint" and not (disk / ballast).exists() and not good:
            with contextlib.suppress(OSError), open(disk / ballast, "wb") as file:
                while True:
                    file.write(bytes(1 << 16))
        settle(event)
        if event["kind"] == "step" and event["step"] == 40:
            good.extend(sorted(p for p in (disk / "run" / "checkpoints").glob("step-*") if (p / "meta.json").exists()))
            (disk / ballast).unlink()

    good: list[Path] = []
    with small_disk(tmp_path / "disk", 40) as disk:
        run = shoal.train(make_job(), plan=PLAN, run_dir=disk / "run", on_event=fill)
        failed = events(disk / "run", "checkpoint_failed")
        assert failed and "No space left on device" in failed[0]["reason"]
        assert good, "the last good checkpoint stays while the disk is full"
        made = events(disk / "run", "checkpoint")
        # Once there is room again, checkpoints are made again.
        assert made[-1]["step"] == run.summary()["steps"] == 4 * noisy_job.STEPS_PER_EPOCH
        assert [e["step"] for e in events(disk / "run", "step")] == list(range(1, 4 * noisy_job.STEPS_PER_EPOCH + 1))
        assert not list((disk / "run" / "checkpoints").glob(".part-*"))
        assert digest(run) == run.summary()["weights_sha256"]


# -- a small /dev/shm ------------------------------------------------------------------------------------------------


def test_large_arena_with_a_small_dev_shm(tmp_path: Path) -> None:
    """A container's 64 MB do not matter: shared memory without a name does not count there."""
    if os.geteuid() != 0 or subprocess.run(["unshare", "-m", "true"], capture_output=True).returncode:
        pytest.skip("a mount namespace of its own needs root")
    script = tmp_path / "large.py"
    script.write_text(
        "import os, shoal, torch\n"
        "from torch import nn\n"
        "assert os.statvfs('/dev/shm').f_blocks * os.statvfs('/dev/shm').f_frsize == 64 << 20\n"
        "job = shoal.Job(model=lambda: nn.Linear(3000, 4000, bias=False), batch_size=4, epochs=3,\n"
        "    train_data=lambda: (torch.randn(4, 3000), torch.randn(4, 4000)), loss=nn.functional.mse_loss,\n"
        "    optimizer=lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9))\n"
        f"run = shoal.train(job, plan='dp=2,threads=1', run_dir={str(tmp_path / 'run')!r})\n"
        "print(run.summary()['steps'], os.listdir('/dev/shm'))\n"
    )
    inside = f"mount -t tmpfs -o size=64m none /dev/shm && exec {sys.executable} {script}"
    done = subprocess.run(
        ["unshare", "-m", "sh", "-c", inside], env=environment(PYTHONPATH=str(ROOT)), capture_output=True, text=True,
        timeout=250,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[-2] == "3 []"
