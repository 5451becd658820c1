"""``shoal train`` and the commands that look at what it left, from a job in a file."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from safetensors import safe_open
from safetensors.torch import load_file

from shoal.cli.main import main
from shoal.observe.events import read_events
from shoal.plan import Plan

ROOT = Path(__file__).resolve().parents[2]
PLAN = "dp=2,threads=1"
STEPS_PER_EPOCH = 4

JOB = """
import torch
import shoal

print("a line from the job's file")


def data(count=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 8, generator=generator)
    return x, (x.sum(1) > 0).long()


def model():
    print("a line from the model's function")
    return torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.ReLU(), torch.nn.Linear(16, 2))


def accuracy(output, target):
    return (output.argmax(1) == target).float().mean()


def loss(output, target):
    print("a line from the loss")
    return torch.nn.functional.cross_entropy(output, target)


small = shoal.Job(
    name="small",
    model=model,
    train_data=data,
    eval_data=lambda: data(32, 1),
    loss=loss,
    optimizer=lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    metrics={"accuracy": accuracy},
    batch_size=16,
    epochs=2,
)
"""

# What docs/events.md promises of each kind.
FIELDS = {
    "run_start": {
        "run", "job", "plan", "world_size", "steps_total", "epochs_total", "samples", "batch_size", "steps_per_epoch",
        "resumed_from", "versions",
    },
    "plan": {"plan", "why", "batch", "predicted_step_s"},
    "step": {"step", "epoch", "loss", "loss_mean", "metrics", "samples", "step_s", "workers"},
    "epoch": {
        "epoch", "loss", "accuracy", "eval_loss", "eval_accuracy", "samples_per_s", "step", "train_s", "eval_s",
    },
    "checkpoint": {"step", "path", "bytes", "write_s"},
    "stop": {"step", "reason"},
    "run_end": {
        "status", "steps", "epochs", "samples_per_s", "step_s", "predicted_step_s", "memory_mb",
        "predicted_memory_mb", "startup_s", "eval_s", "wall_s", "model", "weights_sha256",
    },
}  # fmt: skip


class Ran(NamedTuple):
    """A command that has run."""

    code: int
    out: str
    err: str

    @property
    def answer(self) -> Any:
        """The one JSON object on standard output."""
        assert self.code == 0, self.err
        return json.loads(self.out)


class Place(NamedTuple):
    """A directory with the job's file, and the run that the tests look at."""

    path: Path
    job: str
    first: Ran
    run: Path


def command(*words: str) -> Ran:
    """Run a shoal command in this process (which has torch already); its standard output by the file descriptor."""
    out, err = io.StringIO(), io.StringIO()
    read, write = os.pipe()
    kept = os.dup(1)
    os.dup2(write, 1)
    os.close(write)
    try:
        with contextlib.redirect_stderr(err), contextlib.redirect_stdout(out):
            code = main(words)
    finally:
        os.dup2(kept, 1)
        os.close(kept)
    with open(read, encoding="utf-8") as stream:
        return Ran(code, out.getvalue() + stream.read(), err.getvalue())


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """One run, made as a user makes it: a process of its own, the exported program and all."""
    path = tmp_path_factory.mktemp("train")
    (path / "my_job.py").write_text(JOB)
    job = f"{path}/my_job.py:small"
    before, exported = Path.cwd(), os.environ.pop("SHOAL_EXPORT", None)
    done = subprocess.run(
        [sys.executable, "-m", "shoal", "train", job, "--plan", PLAN, "--run", "first", "--tensorboard", "--json"],
        cwd=path, capture_output=True, text=True, timeout=300, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    os.chdir(path)
    os.environ["SHOAL_EXPORT"] = "0"
    try:
        yield Place(path, job, Ran(done.returncode, done.stdout, done.stderr), path / "first")
    finally:
        os.chdir(before)
        del os.environ["SHOAL_EXPORT"]
        if exported is not None:
            os.environ["SHOAL_EXPORT"] = exported


def sha256_by_the_contract(file: Path) -> str:
    """The checksum of the weights, written down again from the contract's words and the file's own bytes."""
    dtypes = {"F32": "float32", "F64": "float64", "I64": "int64"}
    digest = hashlib.sha256()
    raw = file.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    for name in sorted(set(header) - {"__metadata__"}):
        entry = header[name]
        low, high = entry["data_offsets"]
        digest.update(f"{name}\0{dtypes[entry['dtype']]}\0{','.join(map(str, entry['shape']))}\0".encode())
        digest.update(raw[8 + size + low : 8 + size + high])
    return digest.hexdigest()


# -- one run ---------------------------------------------------------------------------------------------------------


def test_json_is_one_object_with_every_key_of_the_contract(place: Place) -> None:
    assert place.first.out.count("\n") == 1 and place.first.out.endswith("\n")
    told = place.first.answer
    kinds: dict[str, type | tuple[type, ...]] = {
        "run": str, "plan": str, "world_size": int, "steps": int, "epochs": list, "final": dict, "samples_per_s": float,
        "step_s": float, "predicted_step_s": (float, type(None)), "peak_rss_mb": list, "pss_mb": float,
        "weights_sha256": str,
    }  # fmt: skip
    for key, kind in kinds.items():
        assert isinstance(told[key], kind), (key, told[key])
    assert (told["world_size"], told["steps"]) == (2, 2 * STEPS_PER_EPOCH)
    assert [entry["epoch"] for entry in told["epochs"]] == [1, 2]
    for entry in told["epochs"]:
        assert set(entry) == {"epoch", "loss", "accuracy", "eval_loss", "eval_accuracy", "samples_per_s"}
        assert all(isinstance(entry[name], float) for name in set(entry) - {"epoch"})
    assert told["final"] == told["epochs"][-1]
    assert len(told["peak_rss_mb"]) >= 3 and all(value > 10 for value in told["peak_rss_mb"])
    assert 0 < told["pss_mb"] < sum(told["peak_rss_mb"])
    assert told["samples_per_s"] > 0 and told["step_s"] > 0
    plan = Plan.parse(told["plan"])
    assert str(plan) == told["plan"] and (plan.dp, plan.threads) == (2, 1)


def test_what_user_code_prints_goes_to_standard_error(place: Place) -> None:
    for words in ("the job's file", "the model's function", "the loss"):
        assert f"a line from {words}" in place.first.err
    assert "Traceback" not in place.first.err


def test_the_checksum_is_that_of_the_weights_on_disk(place: Place) -> None:
    assert sha256_by_the_contract(place.run / "model" / "weights.safetensors") == place.first.answer["weights_sha256"]


def test_the_run_directory_holds_what_the_contract_lists(place: Place) -> None:
    assert str(Plan.from_toml((place.run / "plan.toml").read_text())) == place.first.answer["plan"]
    job = json.loads((place.run / "job.json").read_text())
    assert (job["name"], job["batch_size"], job["epochs"], job["seed"]) == ("small", 16, 2, 0)
    assert json.loads((place.run / "processes.json").read_text()) == [], "the run is over, no process is left"
    assert any((place.run / "checkpoints").iterdir())
    assert (place.run / "learning_curve.png").read_bytes()[:4] == b"\x89PNG"
    bundle = json.loads((place.run / "model" / "bundle.json").read_text())
    assert bundle["name"] == "small" and bundle["program"] is True
    assert bundle["inputs"] == [{"name": "input", "dtype": "FP32", "shape": [-1, 8]}]
    assert bundle["outputs"] == [{"name": "output", "dtype": "FP32", "shape": [-1, 2]}]
    copied = place.run / "model" / bundle["source"]["file"]
    assert copied.read_text() == JOB
    assert bundle["source"]["sha256"] == hashlib.sha256(JOB.encode()).hexdigest()
    assert {"torch", "python", "shoal"} <= set(bundle["versions"]) and "unknown" not in bundle["versions"].values()
    assert (place.run / "model" / "program.pt2").stat().st_size > 0
    with safe_open(place.run / "model" / "weights.safetensors", "pt") as file:
        assert sorted(file.keys()) == ["0.bias", "0.weight", "2.bias", "2.weight"]


def test_the_exported_program_computes_what_the_model_computes(place: Place) -> None:
    import torch

    import shoal

    x = torch.randn(5, 8, generator=torch.Generator().manual_seed(3))
    program = torch.export.load(place.run / "model" / "program.pt2").module()
    model = shoal.load(place.run)
    assert torch.equal(model(x), program(x))
    weights = load_file(place.run / "model" / "weights.safetensors")
    by_hand = torch.relu(x @ weights["0.weight"].T + weights["0.bias"]) @ weights["2.weight"].T + weights["2.bias"]
    assert torch.allclose(model(x), by_hand, atol=1e-6)


def test_events_have_the_kinds_and_fields_that_are_documented(place: Place) -> None:
    events = list(read_events(place.run / "events.jsonl"))
    kinds = [event["kind"] for event in events]
    assert kinds[:2] == ["run_start", "plan"] and kinds[-1] == "run_end"
    assert kinds.count("step") == 2 * STEPS_PER_EPOCH and kinds.count("epoch") == 2 and "checkpoint" in kinds
    assert [event["t"] for event in events] == sorted(event["t"] for event in events)
    for event in events:
        assert set(event) - {"t", "kind"} == FIELDS[event["kind"]], event["kind"]
    documented = (ROOT / "docs" / "events.md").read_text()
    assert all(f"### `{kind}`" in documented for kind in FIELDS)
    steps = [event for event in events if event["kind"] == "step"]
    assert [(s["step"], s["epoch"]) for s in steps] == [(n, (n - 1) // STEPS_PER_EPOCH + 1) for n in range(1, 9)]
    for step in steps:
        assert step["samples"] == 16 and step["step_s"] > 0 and set(step["metrics"]) == {"accuracy"}
        assert [worker["rank"] for worker in step["workers"]] == [0, 1]
        for worker in step["workers"]:
            assert set(worker) == {"rank", "compute_s", "reduce_s", "wait_s", "data_s"}
            assert all(value >= 0 for value in worker.values())
    start, end, told = events[0], events[-1], place.first.answer
    assert (start["steps_total"], start["epochs_total"], start["samples"], start["resumed_from"]) == (8, 2, 64, None)
    assert "unknown" not in start["versions"].values()
    assert next(e for e in events if e["kind"] == "plan")["batch"] == "global 16 = 2 × 8"
    assert (end["status"], end["steps"], end["epochs"]) == ("done", 8, 2)
    assert end["weights_sha256"] == told["weights_sha256"] and end["step_s"] == told["step_s"]
    means = [step["loss_mean"] for step in steps][STEPS_PER_EPOCH - 1 :: STEPS_PER_EPOCH]
    assert means == [entry["loss"] for entry in told["epochs"]]
    by_hand = sum(step["loss"] for step in steps[:STEPS_PER_EPOCH]) / STEPS_PER_EPOCH
    assert means[0] == pytest.approx(by_hand, rel=1e-6), "equal batches: the running mean is the mean of the steps"


def test_tensorboard_files_can_be_read_back(place: Place) -> None:
    (file,) = (place.run / "tensorboard").glob("events.out.tfevents.*")
    found = _scalars(file)
    told = place.first.answer
    steps = [e for e in read_events(place.run / "events.jsonl") if e["kind"] == "step"]
    assert found["step/loss"] == {s["step"]: pytest.approx(s["loss"], rel=1e-6) for s in steps}
    for name in ("loss", "eval_loss", "eval_accuracy"):
        assert found[f"epoch/{name}"] == {e["epoch"]: pytest.approx(e[name], rel=1e-6) for e in told["epochs"]}


def _scalars(file: Path) -> dict[str, dict[int, float]]:
    """The scalars in a TensorBoard file: records of length (8), its checksum (4), an Event, its checksum (4)."""
    from tensorboardX.proto.event_pb2 import Event

    found: dict[str, dict[int, float]] = {}
    raw, at = file.read_bytes(), 0
    while at < len(raw):
        size = int.from_bytes(raw[at : at + 8], "little")
        event = Event.FromString(raw[at + 12 : at + 12 + size])
        at += size + 16
        for value in event.summary.value:
            found.setdefault(value.tag, {})[event.step] = value.simple_value
    return found


# -- going on, looking, comparing ------------------------------------------------------------------------------------


def test_steps_are_a_total_and_a_resumed_run_ends_with_the_same_bits(place: Place) -> None:
    stopped = command("train", place.job, "--plan", PLAN, "--steps", "6", "--run", "second", "--json").answer
    assert stopped["steps"] == 6
    assert [(e["epoch"], e.get("partial")) for e in stopped["epochs"]] == [(1, None), (2, True)]
    assert stopped["final"]["partial"] is True and "eval_loss" not in stopped["final"]
    assert stopped["weights_sha256"] != place.first.answer["weights_sha256"]
    events = list(read_events(place.path / "second" / "events.jsonl"))
    assert [(e["step"], e["reason"]) for e in events if e["kind"] == "stop"] == [(6, "steps")]
    gone_on = command("train", place.job, "--run", "second", "--resume", "--json").answer
    assert gone_on["steps"] == 8
    assert gone_on["plan"] == place.first.answer["plan"], "without --plan the run's own plan is taken"
    assert gone_on["weights_sha256"] == place.first.answer["weights_sha256"]
    starts = [e for e in read_events(place.path / "second" / "events.jsonl") if e["kind"] == "run_start"]
    assert [e["resumed_from"] for e in starts] == [None, 6]
    without_speed = [{k: v for k, v in e.items() if k != "samples_per_s"} for e in gone_on["epochs"]]
    assert without_speed == [
        {k: v for k, v in e.items() if k != "samples_per_s"} for e in place.first.answer["epochs"]
    ], "the partial epoch is whole now, and the history is that of the undisturbed run"

    compared = command("compare", "first", "second", "--json").answer
    assert compared["max_rel_diff"] == 0.0 and len(compared["history"]) == 2
    assert "max_rel_diff: 0" in command("compare", "first", "second").out


def test_a_finished_run_says_so_and_can_be_trained_further(place: Place) -> None:
    before = sorted(p.name for p in place.run.iterdir())
    again = command("train", place.job, "--run", "first", "--resume", "--json")
    assert again.answer == place.first.answer
    assert "first is finished already; raise --epochs or --steps to train it further." in again.err
    assert sorted(p.name for p in place.run.iterdir()) == before
    assert json.loads((place.run / "processes.json").read_text()) == []
    # Copied, so that the other tests go on seeing the run as it was.
    import shutil

    shutil.copytree("first", "third")
    further = command("train", place.job, "--run", "third", "--resume", "--epochs", "3", "--json").answer
    assert (further["steps"], [e["epoch"] for e in further["epochs"]]) == (12, [1, 2, 3])
    assert further["epochs"][:2] == place.first.answer["epochs"]
    assert further["weights_sha256"] != place.first.answer["weights_sha256"]
    assert further["weights_sha256"] == sha256_by_the_contract(place.path / "third" / "model" / "weights.safetensors")


def test_set_and_seed_change_the_job_and_the_run_goes_to_runs(place: Place) -> None:
    told = command(
        "train", place.job, "--plan", "dp=1,threads=1", "--set", "batch_size=40", "--set", "epochs=1", "--seed", "5",
        "--quiet", "--json",
    )  # fmt: skip
    answer = told.answer
    assert answer["steps"] == 2 and answer["world_size"] == 1
    run = Path(answer["run"])
    assert run.parent == Path("runs") and run.name.startswith("small-")
    job = json.loads((run / "job.json").read_text())
    assert (job["batch_size"], job["epochs"], job["seed"]) == (40, 1, 5)
    sizes = [e["samples"] for e in read_events(run / "events.jsonl", ["step"])]
    assert sizes == [40, 24], "the last batch is ragged"

    (row,) = command("runs", "--json").answer["runs"]
    assert (row["name"], row["job"], row["status"], row["steps"]) == (run.name, "small", "done", 2)
    assert row["metric"] == "eval_accuracy" and row["value"] == answer["final"]["eval_accuracy"]
    assert run.name in command("runs").out


def test_eval_gives_the_metrics_of_the_last_epoch(place: Place) -> None:
    metrics = command("eval", str(place.run), "--json").answer
    final = place.first.answer["final"]
    assert metrics == {
        "eval_loss": pytest.approx(final["eval_loss"], rel=1e-6), "eval_accuracy": final["eval_accuracy"],
    }  # fmt: skip


def test_plan_explains_and_its_help_has_a_line_for_each_key(place: Place) -> None:
    from shoal.plan import GLOSSARY

    before = sorted(p.name for p in place.path.iterdir() if p.name != "runs")
    told = command("plan", "--help")
    assert told.code == 0
    lines = told.out.splitlines()
    for key in GLOSSARY:
        assert any(line.split()[:1] == [key] for line in lines), key
    told = command("plan", place.job, "--plan", PLAN, "--json")
    plan = Plan.parse(told.answer["plan"])
    assert (plan.dp, plan.threads) == (2, 1)
    predicted = told.answer["predicted"]
    assert all(predicted[key] > 0 for key in ("step_s", "memory_mb_per_worker", "compute_s", "comm_s"))
    assert any(candidate["plan"] == told.answer["plan"] for candidate in told.answer["candidates"])
    assert sorted(p.name for p in place.path.iterdir() if p.name != "runs") == before, "planning leaves nothing behind"


def test_doctor_needs_no_target() -> None:
    told = command("doctor", "--json").answer
    assert {"machine", "versions", "checks"} <= set(told)
