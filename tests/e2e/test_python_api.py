"""The contract's Python side: ``shoal.train`` and the Run that it returns, from this process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import shoal
from shoal.observe.compare import weights_sha256
from shoal.observe.events import read_events

ROOT = Path(__file__).resolve().parents[2]
PLAN = "dp=2,threads=1"
STEPS_PER_EPOCH = 6


def data(count: int = 96, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 6, generator=generator)
    return x, (x.sum(1) > 0).long()


def evaluation_data() -> tuple[torch.Tensor, torch.Tensor]:
    return data(40, 1)


def model() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(6, 12), torch.nn.Tanh(), torch.nn.Linear(12, 2))


def accuracy(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output.argmax(1) == target).float().mean()


def sgd(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.05)


JOB = shoal.Job(
    name="api",
    model=model,
    train_data=data,
    eval_data=evaluation_data,
    loss=torch.nn.functional.cross_entropy,
    optimizer=sgd,
    metrics={"accuracy": accuracy},
    batch_size=16,
    epochs=2,
)


class Watched:
    """A run with everything that its ``on_event`` was told, where, and in which thread."""

    def __init__(self, path: Path) -> None:
        self.events: list[dict[str, Any]] = []
        self.places: set[tuple[int, int]] = set()
        self.run = shoal.train(JOB, plan=shoal.Plan.parse(PLAN), run_dir=path, on_event=self.see)

    def see(self, event: dict[str, Any]) -> None:
        self.events.append(event)
        self.places.add((os.getpid(), threading.get_ident()))


@pytest.fixture(scope="module", autouse=True)
def _no_export() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHOAL_EXPORT", "0")
        yield


@pytest.fixture(scope="module")
def watched(tmp_path_factory: pytest.TempPathFactory, _no_export: None) -> Watched:
    return Watched(tmp_path_factory.mktemp("api") / "run")


def test_the_whole_public_surface() -> None:
    assert shoal.__all__ == [
        "Client", "Cluster", "Job", "Plan", "Run", "ShoalError", "__version__", "data", "load", "open", "plan", "predict",
        "ps", "serve", "train",
    ]  # fmt: skip
    assert dir(shoal) == shoal.__all__
    with pytest.raises(AttributeError, match="nothing_like_this"):
        shoal.nothing_like_this  # noqa: B018
    for name in ("csv", "folder"):
        assert callable(getattr(shoal.data, name))


@pytest.mark.parametrize("name", [name for name in shoal.__all__ if name not in ("__version__", "data")])
def test_every_public_name_is_there_and_documented(name: str) -> None:
    assert (getattr(shoal, name).__doc__ or "").strip()


def test_importing_shoal_imports_no_torch() -> None:
    code = "import sys, shoal; shoal.Job, shoal.Plan, shoal.Cluster; sys.exit('torch' in sys.modules)"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    assert subprocess.run([sys.executable, "-c", code], env=env, timeout=200, check=False).returncode == 0


def test_plan_chooses_and_explains() -> None:
    plan = shoal.plan(JOB)
    assert isinstance(plan, shoal.Plan) and shoal.Plan.parse(str(plan)) == plan
    assert plan.dp and plan.threads and plan.layout, "nothing that can change a bit is left open"
    assert "fastest" in plan.why()
    assert shoal.plan(JOB) == plan, "remembered, not tried again"


# -- a run and what it holds -----------------------------------------------------------------------------------------


def test_on_event_gets_every_event_in_order_in_the_callers_thread(watched: Watched) -> None:
    assert watched.places == {(os.getpid(), threading.get_ident())}
    written = list(read_events(watched.run.path / "events.jsonl"))
    assert [(e["kind"], e["t"]) for e in watched.events] == [(e["kind"], e["t"]) for e in written]
    steps = [e["step"] for e in watched.events if e["kind"] == "step"]
    assert steps == list(range(1, 2 * STEPS_PER_EPOCH + 1))
    for at, event in enumerate(watched.events):
        if event["kind"] == "epoch":
            before = [e["step"] for e in watched.events[:at] if e["kind"] == "step"]
            assert before[-1] == event["step"] == event["epoch"] * STEPS_PER_EPOCH


def test_a_run_holds_its_plan_history_weights_and_model(watched: Watched) -> None:
    run = watched.run
    assert isinstance(run, shoal.Run) and isinstance(run.plan, shoal.Plan) and run.plan.dp == 2
    assert run.samples_per_s is not None and run.samples_per_s > 0
    assert [set(entry) for entry in run.history] == [
        {"epoch", "loss", "accuracy", "eval_loss", "eval_accuracy", "samples_per_s"}
    ] * 2
    weights, module = run.weights(), run.model()
    assert weights_sha256(weights) == run.summary()["weights_sha256"]
    assert list(module.state_dict()) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert all(torch.equal(value, weights[name]) for name, value in module.state_dict().items())
    assert not module.training

    x, y = evaluation_data()
    with torch.no_grad():
        output = module(x)
    by_hand = {
        "eval_loss": float(torch.nn.functional.cross_entropy(output, y)), "eval_accuracy": float(accuracy(output, y)),
    }  # fmt: skip
    assert run.evaluate() == pytest.approx(by_hand, rel=1e-5)
    last = {name: value for name, value in run.history[-1].items() if name.startswith("eval_")}
    assert last == pytest.approx(by_hand, rel=1e-5)
    other = run.evaluate((x[:8], y[:8]))
    assert other["eval_accuracy"] == pytest.approx(float(accuracy(output[:8], y[:8])), rel=1e-5)


def test_open_returns_the_run_of_a_directory(watched: Watched) -> None:
    opened = shoal.open(watched.run.path)
    assert (opened.plan, opened.history, opened.samples_per_s) == (
        watched.run.plan, watched.run.history, watched.run.samples_per_s,
    )  # fmt: skip
    assert weights_sha256(opened.weights()) == watched.run.summary()["weights_sha256"]
    with pytest.raises(shoal.ShoalError, match="is not a run directory"):
        shoal.open(watched.run.path / "model")


def test_stop_ends_the_run_exactly_after_the_step_and_it_resumes_to_the_same_bits(
    watched: Watched, tmp_path: Path
) -> None:
    def stop_at_8(event: dict[str, Any]) -> str | None:
        return "stop" if event["kind"] == "step" and event["step"] == 8 else None

    stopped = shoal.train(JOB, plan=PLAN, run_dir=tmp_path / "run", on_event=stop_at_8)
    assert stopped.summary()["steps"] == 8
    assert [entry.get("partial", False) for entry in stopped.history] == [False, True]
    events = list(read_events(stopped.path / "events.jsonl"))
    assert [e["step"] for e in events if e["kind"] == "step"] == list(range(1, 9))
    assert [(e["step"], e["reason"]) for e in events if e["kind"] == "stop"] == [(8, "on_event")]
    assert events[-1]["status"] == "stopped"
    resumed = shoal.train(JOB, run_dir=tmp_path / "run", resume=True)
    assert resumed.summary()["weights_sha256"] == watched.run.summary()["weights_sha256"]
    assert len(resumed.history) == 2 and not any("partial" in entry for entry in resumed.history)


def test_stop_at_the_last_step_of_an_epoch_from_another_thread(tmp_path: Path) -> None:
    """Also: a model that is an instance, and one worker; signals stay those of the main thread."""
    instance = model()
    kept = [p.detach().clone() for p in instance.parameters()]
    found: list[shoal.Run] = []

    def stop(event: dict[str, Any]) -> str | None:
        return "stop" if event["kind"] == "step" and event["step"] == STEPS_PER_EPOCH else None

    def work() -> None:
        job = JOB.replace(model=instance, loss=lambda output, target: torch.nn.functional.cross_entropy(output, target))
        found.append(shoal.train(job, plan="dp=1,threads=1", run_dir=tmp_path / "run", on_event=stop))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join(timeout=300)
    (run,) = found
    assert run.summary()["steps"] == STEPS_PER_EPOCH
    (entry,) = run.history
    assert "partial" not in entry and "eval_loss" in entry, "the epoch was whole, so it is evaluated"
    assert all(torch.equal(a, b) for a, b in zip(kept, instance.parameters(), strict=True)), "their module is theirs"
    trained = run.model()
    assert weights_sha256(trained.state_dict()) == run.summary()["weights_sha256"]
    assert any(not torch.equal(a, b) for a, b in zip(kept, trained.parameters(), strict=True))


# -- bundles ---------------------------------------------------------------------------------------------------------

FILE = """
import torch
import shoal


class Doubling(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(3, 2)

    def forward(self, x):
        return 2 * self.linear(x)


def build():
    return Doubling()


def data():
    x = torch.arange(24.0).reshape(8, 3) / 24
    return x, torch.tensor([0, 1] * 4)


tiny = shoal.Job(name="tiny", model=build, train_data=data, loss=torch.nn.functional.cross_entropy, batch_size=4)
"""

LOAD = """
import json, sys
import torch
import shoal

model = shoal.load(sys.argv[1])
print(json.dumps({"answer": model(torch.ones(5, 3)).tolist(), "kind": type(model).__name__}))
"""


def _load_elsewhere(bundle: Path, elsewhere: Path) -> Any:
    """Load a bundle in a fresh process that knows nothing of this one; what it answers for five rows of ones."""
    done = subprocess.run(
        [sys.executable, "-c", LOAD, str(bundle)], cwd=elsewhere, capture_output=True, text=True, timeout=300,
        check=False, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_bundle_opens_elsewhere_by_the_copied_source(tmp_path: Path) -> None:
    from shoal.cli.main import main

    job_file = tmp_path / "tiny_job.py"
    job_file.write_text(FILE)
    run = tmp_path / "run"
    assert main(["train", f"{job_file}:tiny", "--plan", "dp=1,threads=1", "--run", str(run), "--quiet"]) == 0
    job_file.unlink()
    weights = shoal.open(run).weights()
    expected = 2 * (torch.ones(5, 3) @ weights["linear.weight"].T + weights["linear.bias"])
    told = _load_elsewhere(run / "model", tmp_path)
    assert told["kind"] == "Doubling"
    assert torch.allclose(torch.tensor(told["answer"]), expected, atol=1e-6)
    (run / "model" / "tiny_job.py").write_text(FILE.replace("2 *", "3 *"))
    with pytest.raises(shoal.ShoalError, match="was changed after the bundle was written"):
        shoal.load(run)


def test_a_bundle_without_code_opens_elsewhere_by_the_program(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SHOAL_EXPORT")
    job = JOB.replace(
        name="lambda", model=lambda: torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.Sigmoid()),
        train_data=(torch.rand(8, 3), torch.tensor([0, 1] * 4)), eval_data=None, metrics={},
    )  # fmt: skip
    run = shoal.train(job, plan="dp=1,threads=1", run_dir=tmp_path / "run", epochs=1)
    assert json.loads((run.path / "model" / "bundle.json").read_text())["factory"] is None
    told = _load_elsewhere(run.path / "model", tmp_path)
    assert torch.allclose(torch.tensor(told["answer"]), run.model()(torch.ones(5, 3)), atol=1e-6)
    (run.path / "model" / "program.pt2").unlink()
    with pytest.raises(shoal.ShoalError, match="cannot be found and there is no program.pt2"):
        shoal.load(run.path)
    with pytest.raises(shoal.ShoalError, match="no evaluation data"):
        run.evaluate()
