"""Models that are split, and updates that are shared, among processes without shared memory.

This file is also the script that torchrun starts: see ``script``.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import model_zoo as zoo
import pytest
import torch
from torchrun import torchrun

import shoal
from shoal import bundle
from shoal.errors import PlanError, UserCodeError, WorkerLostError
from shoal.observe.compare import max_rel_diff
from shoal.observe.events import read_events

HERE = Path(__file__).resolve()

# Shared memory and none in turn, each from the checkpoint of another.
LEGS = [
    ("tp=2", "group", 2),
    ("dp=2,zero=3", "arena", 4),
    ("pp=2,microbatches=4", "group", 6),
    ("dp=2,zero=3", "group", 9),
    ("dp=2,tp=2,zero=2", "group", 11),
    ("dp=2", "arena", 13),
]


PLANS = {"tensor": "dp=2,tp=2", "sharded": "dp=4,zero=3", "pipeline": "dp=2,pp=2,microbatches=3,zero=1"}


def job() -> shoal.Job:
    """A transformer with a tied head: clipped, with a schedule, and a last batch that is smaller."""
    return zoo.job(
        "gpt", grad_clip=0.5, epochs=4, metrics={"accuracy": zoo.accuracy},
        scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 3, 0.7),
    )  # fmt: skip


def script(place: Path) -> None:
    """What each of four processes that torchrun started does, on two machines as far as shared memory goes."""
    rank = int(os.environ["RANK"])
    os.environ["SHOAL_MACHINE"] = f"number {rank // 2}"
    said: dict[str, Any] = {}
    for name, plan in PLANS.items():
        run = shoal.train(job(), plan=f"{plan},threads=1", run_dir=place / name, steps=5)
        said[name] = {n: float(w.double().sum()) for n, w in run.weights().items()}
    try:
        shoal.train(job().replace(loss=fails_on_three), plan="tp=2,dp=2", run_dir=place / "user")
    except UserCodeError as error:
        said["user"] = [error.rank, str(error)]
    for plan in ("tp=2", "dp=3,zero=3"):
        try:
            shoal.train(job(), plan=plan, run_dir=place / "refused")
        except PlanError as error:
            said[plan] = str(error)
    (place / f"said-{rank}.json").write_text(json.dumps(said))


def fails_on_three(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    if os.environ.get("RANK") == "3":
        raise ValueError("only here")
    return torch.nn.functional.cross_entropy(output.flatten(0, 1), target.flatten())


@pytest.fixture(scope="module", autouse=True)
def _no_export() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHOAL_EXPORT", "0")
        yield


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> shoal.Run:
    return shoal.train(
        job(), plan="dp=1,threads=1", run_dir=tmp_path_factory.mktemp("alone") / "run", steps=LEGS[-1][2]
    )


def test_every_plan_goes_on_from_any_other_and_comes_to_one_workers_weights(
    tmp_path: Path, alone: shoal.Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Checkpoints are written under way, too.
    monkeypatch.setenv("SHOAL_CHECKPOINT_S", "0")
    for number, (plan, transport, steps) in enumerate(LEGS):
        monkeypatch.setenv("SHOAL_TRANSPORT", transport)
        run = shoal.train(job(), plan=f"{plan},threads=1", run_dir=tmp_path / "run", resume=number > 0, steps=steps)
        assert run.summary()["steps"] == steps
    assert [e["resumed_from"] for e in read_events(tmp_path / "run" / "events.jsonl", ["run_start"])] == [
        None, *(steps for _, _, steps in LEGS[:-1])
    ]  # fmt: skip
    assert max_rel_diff(alone.weights(), run.weights()) < 1e-9
    for mine, theirs in zip(run.history, alone.history, strict=True):
        # The last epoch is a part of one, and not evaluated.
        assert {**mine, "samples_per_s": 0} == pytest.approx({**theirs, "samples_per_s": 0}, rel=1e-9)
    assert "eval_accuracy" in run.history[0]


def test_memory_inside_a_machine_and_gloo_between_two(tmp_path: Path) -> None:
    process = torchrun(HERE, tmp_path, processes=4, SHOAL_CHECKPOINT_S="0")
    _, errors = process.communicate(timeout=500)
    assert process.returncode == 0, errors
    said = [json.loads((tmp_path / f"said-{rank}.json").read_text()) for rank in range(4)]
    assert all(s == said[0] for s in said)
    alone = shoal.train(job(), plan="dp=1,threads=1", run_dir=tmp_path / "alone", steps=5)
    for name in PLANS:
        assert max_rel_diff(alone.weights(), shoal.open(tmp_path / name).weights()) < 1e-9
        (plan,) = read_events(tmp_path / name / "events.jsonl", ["plan"])
        assert "gloo between 2 machines" in plan["why"][0]
        # A service can follow a run in parts, too: the first checkpoint has all but the weights beside it.
        beside, model = (bundle.read_description(tmp_path / name / place) for place in ("checkpoints", "model"))
        assert beside["inputs"] and all(beside[key] == model[key] for key in ("name", "inputs", "outputs"))
    assert said[0]["user"][0] == 3 and "only here" in said[0]["user"][1]
    assert said[0]["tp=2"].endswith("started with 4 processes; write dp=2,tp=2, or start 2 processes.")
    assert said[0]["dp=3,zero=3"].startswith(
        "The plan says dp=3 and the job was started with 4 processes; write dp=4,zero=3"
    )


def test_a_killed_process_ends_the_run_with_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHOAL_TRANSPORT", "group")
    monkeypatch.setenv("SHOAL_FAULTS", "kill(rank=1,step=3,phase=backward)")
    with pytest.raises(WorkerLostError, match="Worker 1 died .SIGKILL."):
        shoal.train(job(), plan="tp=2,threads=1", run_dir=tmp_path / "run")


if __name__ == "__main__":
    script(Path(sys.argv[1]))
