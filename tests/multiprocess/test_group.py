"""Workers that share no memory: jobs started by torchrun, and shoal's own processes over gloo.

This file is also the script that torchrun starts: see ``script``.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional
from torchmetrics import Metric
from torchrun import torchrun

import shoal
from shoal.comm.group import has_threads
from shoal.errors import LossNotFiniteError, PlanError, UserCodeError, WorkerLostError
from shoal.observe.compare import max_rel_diff
from shoal.observe.events import read_events

SAMPLES, BATCH, WORDS = 103, 20, 11
HERE = Path(__file__).resolve()


class Text(nn.Module):
    """A small attention model with tied embeddings, a parameter that nothing touches, and one touched now and then."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, 8)
        self.norm = nn.LayerNorm(8)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.unused = nn.Parameter(torch.ones(3))
        self.rare = nn.Parameter(torch.ones(1))
        self.double()

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        y = self.norm(x)
        x = x + self.attention(y, y, y, key_padding_mask=tokens == 0, need_weights=False)[0]
        first = (tokens[:, 0] == 3)[:, None, None]
        if bool(first.any()):
            x = torch.where(first, x * self.rare, x)
        return functional.linear(x, self.embed.weight)


def text_data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    tokens = torch.randint(1, WORDS, (SAMPLES, 7), generator=generator)
    lengths = torch.randint(2, 8, (SAMPLES, 1), generator=generator)
    tokens[torch.arange(7) >= lengths] = 0
    return tokens, tokens.roll(-1, 1)


def token_loss(output: torch.Tensor, target: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The sum over tokens that are no padding, and their number."""
    total = functional.cross_entropy(output.transpose(1, 2), target, ignore_index=0, reduction="sum")
    return total, (target != 0).sum()


def hits(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    return (output.argmax(-1) == target).double().mean()


class Right(Metric):
    """The part of all tokens that were right, from all that was ever seen, and how often it was asked."""

    full_state_update = False

    def __init__(self) -> None:
        super().__init__()
        self.add_state("seen", [], dist_reduce_fx="cat")
        self.add_state("count", torch.zeros((), dtype=torch.long), dist_reduce_fx="sum")

    def update(self, output: torch.Tensor, target: torch.Tensor) -> None:
        self.seen.append((output.argmax(-1) == target).flatten())
        self.count += len(target)

    def compute(self) -> dict[str, torch.Tensor]:
        return {"part": torch.cat(list(self.seen)).double().mean(), "count": self.count}


text = shoal.Job(
    name="text", model=Text, train_data=text_data, eval_data=text_data, loss=token_loss,
    metrics={"hits": hits, "right": Right()},
    optimizer=lambda params: torch.optim.Adam(params, lr=1e-2),
    scheduler=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 4, 0.7),
    grad_clip=0.5, batch_size=BATCH, epochs=2,
)  # fmt: skip


def image_data() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(4)
    images = torch.randn(SAMPLES, 2, 6, 6, generator=generator, dtype=torch.float64)
    return images, (images.mean((1, 2, 3)) > 0).long()


def pictures_model() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2), nn.BatchNorm1d(2)
    ).double()


# Whole tensors are dealt out for Adadelta, and each process of a group holds them all. The last batch has 3 samples.
pictures = shoal.Job(
    name="pictures", model=pictures_model, train_data=image_data, eval_data=image_data,
    loss=functional.cross_entropy, optimizer=lambda params: torch.optim.Adadelta(params, lr=0.1), batch_size=BATCH,
    epochs=2,
)  # fmt: skip


def fails_on_one(model: nn.Module, batch: Any) -> torch.Tensor:
    if os.environ.get("RANK") == "1":
        raise ValueError("only here")
    return functional.cross_entropy(model(batch[0]), batch[1])


def no_number(model: nn.Module, batch: Any) -> torch.Tensor:
    return functional.cross_entropy(model(batch[0]), batch[1]) * float("nan")


def script(place: Path) -> None:
    """What each process that torchrun started does: several runs in a row, those that fail among them."""
    rank = os.environ["RANK"]
    said: dict[str, Any] = {}
    for job in (text, pictures):
        run = shoal.train(job, plan="dp=2,threads=1", run_dir=place / job.name)
        said[job.name] = run.summary()["weights_sha256"]
    said["threads"] = has_threads()
    for name, step in (("user", fails_on_one), ("nan", no_number)):
        try:
            shoal.train(pictures.replace(loss=None, step=step, name=name), run_dir=place / name)
        except (UserCodeError, LossNotFiniteError) as error:
            said[name] = [type(error).__name__, str(error), getattr(error, "rank", None)]
        # Nothing of a run that failed may make the next one wait.
        gc.collect()
    try:
        shoal.train(text, plan="dp=3", run_dir=place / "three")
    except PlanError as error:
        said["plan"] = str(error)
    (place / f"said-{rank}.json").write_text(json.dumps(said))


@pytest.fixture(scope="module", autouse=True)
def _no_export() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHOAL_EXPORT", "0")
        yield


@pytest.fixture(scope="module")
def joined(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a script that torchrun started has left its runs."""
    place = tmp_path_factory.mktemp("joined")
    process = torchrun(HERE, place)
    _, errors = process.communicate(timeout=250)
    assert process.returncode == 0, errors
    return place


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with workers that share memory: one, and for one job two."""
    place = tmp_path_factory.mktemp("alone")
    shoal.train(text, plan="dp=1,threads=1", run_dir=place / "text-1")
    shoal.train(text, plan="dp=2,threads=1", run_dir=place / "text-2")
    shoal.train(pictures, plan="dp=1,threads=1", run_dir=place / "pictures-1")
    return place


def difference(left: Path, right: Path) -> float:
    return max_rel_diff(shoal.open(left).weights(), shoal.open(right).weights())


def test_a_job_that_torchrun_started_gets_the_weights_of_one_worker(joined: Path, alone: Path) -> None:
    assert difference(alone / "text-1", joined / "text") < 1e-9
    assert difference(alone / "text-2", joined / "text") < 1e-9
    assert difference(alone / "pictures-1", joined / "pictures") < 1e-9


def test_every_process_comes_to_the_same_weights_and_rank_0_alone_writes(joined: Path) -> None:
    said = [json.loads((joined / f"said-{rank}.json").read_text()) for rank in (0, 1)]
    # Nothing is left that could ask for the interpreter while it ends.
    assert not said[0]["threads"] and not said[1]["threads"]
    for name in ("text", "pictures"):
        assert said[0][name] == said[1][name] == shoal.open(joined / name).summary()["weights_sha256"]
        events = list(read_events(joined / name / "events.jsonl"))
        assert [event["step"] for event in events if event["kind"] == "step"] == list(range(1, 13))
        assert events[-1]["kind"] == "run_end" and events[-1]["status"] == "done"
        assert json.loads((joined / name / "processes.json").read_text()) == []


def test_history_and_evaluation_are_those_of_one_worker(joined: Path, alone: Path) -> None:
    together, single = shoal.open(joined / "text").history, shoal.open(alone / "text-1").history
    assert len(together) == 2
    for mine, theirs in zip(together, single, strict=True):
        measured = {"loss", "hits", "right_count", "right_part"}
        assert set(mine) == {"epoch", "samples_per_s", *measured, *(f"eval_{name}" for name in measured)}
        for name in ("loss", "hits", "eval_loss", "eval_hits"):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-9)


def test_each_step_says_what_every_worker_spent_its_time_on(joined: Path) -> None:
    for event in read_events(joined / "text" / "events.jsonl", ["step"]):
        assert [worker["rank"] for worker in event["workers"]] == [0, 1]
        assert all(worker["compute_s"] > 0 and worker["reduce_s"] > 0 for worker in event["workers"])
        assert event["step_s"] > 0 and set(event["metrics"]) == {"hits"}


def test_what_goes_wrong_in_one_process_is_raised_in_all(joined: Path) -> None:
    said = [json.loads((joined / f"said-{rank}.json").read_text()) for rank in (0, 1)]
    assert said[0]["user"] == said[1]["user"]
    kind, sentence, rank = said[0]["user"]
    assert (kind, rank) == ("UserCodeError", 1) and "only here" in sentence
    (event,) = read_events(joined / "user" / "events.jsonl", ["error"])
    assert event["rank"] == 1 and "ValueError: only here" in event["traceback"]
    assert said[0]["nan"] == said[1]["nan"] and "in step 1 (samples " in said[0]["nan"][1]
    # Both workers' samples are named.
    assert said[0]["nan"][1].count(",") == BATCH - 1
    assert "dp=3" in said[0]["plan"] and said[0]["plan"] == said[1]["plan"]
    assert not (joined / "three").exists()


def test_a_refused_command_says_so_once(tmp_path: Path) -> None:
    process = torchrun("-m", "--", "shoal", "train", f"{HERE}:text", "--plan", "dp=3", "--run", tmp_path / "run")
    output, errors = process.communicate(timeout=200)
    assert process.returncode != 0 and output == ""
    assert errors.count("The plan says dp=3 and the job was started with 2 processes") == 1
    assert "exitcode  : 2" in errors


def test_sigterm_to_any_process_stops_all_and_the_arena_goes_on(tmp_path: Path, alone: Path) -> None:
    place = tmp_path / "run"
    process = torchrun(
        "-m", "--", "shoal", "train", f"{HERE}:text", "--run", place, "--json", SHOAL_FAULTS="slow(rank=0,factor=300,step=6)"
    )
    deadline = time.monotonic() + 120
    while not any(read_events(place / "events.jsonl", ["step"])) if (place / "events.jsonl").exists() else True:
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
    (worker,) = (row for row in json.loads((place / "processes.json").read_text()) if row["rank"] == 1)
    os.kill(worker["pid"], signal.SIGTERM)
    output, errors = process.communicate(timeout=100)
    assert process.returncode == 0, errors
    summary = json.loads(output)
    assert summary["stopped_by"] == "interrupt" and 0 < summary["steps"] < 12
    (stop,) = read_events(place / "events.jsonl", ["stop"])
    assert stop["reason"] == "interrupt"
    shoal.train(text, plan="dp=3,threads=1", run_dir=place, resume=True)
    assert difference(alone / "text-1", place) < 1e-9


def test_without_shared_memory_shoal_starts_the_processes_itself(
    tmp_path: Path, alone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shoal.train(text, plan="dp=2,threads=1", run_dir=tmp_path / "run", steps=5)
    monkeypatch.setenv("SHOAL_TRANSPORT", "group")
    before = torch.get_rng_state()
    seen: list[int] = []

    def watch(event: dict[str, Any]) -> str | None:
        if event["kind"] == "step":
            seen.append(event["step"])
        return "stop" if seen and seen[-1] == 9 else None

    stopped = shoal.train(text, plan="dp=2,threads=1", run_dir=tmp_path / "run", resume=True, on_event=watch)
    assert seen == [6, 7, 8, 9] and stopped.summary()["steps"] == 9
    assert torch.equal(before, torch.get_rng_state())
    # This process was a worker, and is the user's again.
    assert gc.isenabled()
    done = shoal.train(text, plan="dp=1,threads=1", run_dir=tmp_path / "run", resume=True)
    assert done.summary()["steps"] == 12
    assert difference(alone / "text-1", tmp_path / "run") < 1e-9
    assert same_metrics(alone / "text-1", tmp_path / "run")


def same_metrics(one: Path, other: Path) -> bool:
    """Whether the metrics that have a state came to the same in every epoch, over all samples."""
    found = [[(e["right_part"], e["right_count"]) for e in shoal.open(run).history] for run in (one, other)]
    return len(found[0]) == 2 and found[0] == found[1]


def test_a_killed_process_ends_the_run_with_a_sentence(
    tmp_path: Path, alone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOAL_TRANSPORT", "group")
    monkeypatch.setenv("SHOAL_FAULTS", "kill(rank=1,step=10,phase=backward)")
    monkeypatch.setenv("SHOAL_CHECKPOINT_S", "0")
    with pytest.raises(WorkerLostError, match="Worker 1 died .SIGKILL."):
        shoal.train(text, plan="dp=2,threads=1", run_dir=tmp_path / "run")
    (event,) = read_events(tmp_path / "run" / "events.jsonl", ["error"])
    assert "--resume" in event["sentence"]
    monkeypatch.delenv("SHOAL_FAULTS")
    monkeypatch.delenv("SHOAL_TRANSPORT")
    shoal.train(text, plan="dp=2,threads=1", run_dir=tmp_path / "run", resume=True)
    assert list(read_events(tmp_path / "run" / "events.jsonl", ["run_start"]))[-1]["resumed_from"]
    assert same_metrics(alone / "text-1", tmp_path / "run")


if __name__ == "__main__":
    script(Path(sys.argv[1]))
