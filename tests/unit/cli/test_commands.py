"""The commands that need no training, run for real."""

from __future__ import annotations

import json
import types
from pathlib import Path

import pytest
from PIL import Image

from shoal.cli.compare import _side_by_side
from shoal.cli.doctor import CHECKS, Check
from shoal.cli.main import main
from shoal.cli.train import _draw, _Quieted, _tell_finished, _with_resume_command
from shoal.observe.events import EventLog
from shoal.observe.progress import Display
from shoal.plan import GLOSSARY


def test_doctor_says_what_is_there_and_how_to_get_the_rest(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0
    told = json.loads(capfd.readouterr().out)
    assert {"python", "shoal", "torch", "numpy"} <= set(told["versions"])
    assert any(row[0] == "cores" for row in told["machine"])
    assert len(told["checks"]) >= len(CHECKS)
    for check in told["checks"]:
        assert check["available"] or check["remedy"] or check["name"] == "/dev/shm", check


def test_doctor_finds_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    missing = {check.name: check for check in (made() for made in CHECKS[:1])}
    assert missing["C/C++ compiler"] == Check(
        name="C/C++ compiler",
        available=False,
        found="none: torch operations are used instead of native ones, with the same answers",
        remedy="install one, such as: apt install g++",
    )
    (tmp_path / "c++").write_text("#!/bin/sh\n")
    (tmp_path / "c++").chmod(0o755)
    assert CHECKS[0]().available


def test_runs_lists_runs(tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["runs"]) == 0
    assert capfd.readouterr().out.startswith("There are no runs in runs yet;")
    run = tmp_path / "runs" / "net-1"
    run.mkdir(parents=True)
    with EventLog(run / "events.jsonl") as log:
        log.write("run_start", job="net", plan="dp=2")
        log.write("epoch", epoch=1, loss=1.0, eval_loss=0.5, eval_auc=0.75, step=40)
        log.write("run_end", status="done", steps=40)
    assert main(["runs", "--json"]) == 0
    (row,) = json.loads(capfd.readouterr().out)["runs"]
    assert (row["name"], row["job"], row["status"], row["steps"], row["metric"], row["value"]) == (
        "net-1", "net", "done", 40, "eval_auc", 0.75,
    )  # fmt: skip
    for where in (["runs"], ["runs", "runs"], ["runs", "runs/net-1"]):
        assert main(where) == 0
        header, line = capfd.readouterr().out.splitlines()
        assert line.split()[:6] == ["net-1", "net", "done", "40", "auc", "0.7500"] and line.endswith("dp=2")
        assert header.startswith("run ")


def test_data_lists_the_data_sets(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "--json"]) == 0
    assert [found["name"] for found in json.loads(capfd.readouterr().out)["data_sets"]] == ["cifar10", "movielens"]


def test_plan_help_has_a_line_for_each_key(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--help"]) == 0
    shown = capfd.readouterr().out
    glossary = shown.split("What a plan can say:")[1].splitlines()
    keys = [line.split()[0] for line in glossary if line.startswith("  ") and line[2] != " "]
    assert keys == list(GLOSSARY)


def test_histories_stand_side_by_side_also_of_unequal_length() -> None:
    first = [{"epoch": 1, "loss": 1.0, "eval_auc": 0.5}, {"epoch": 2, "loss": 0.5, "eval_auc": 0.75}]
    assert _side_by_side(first, [{"epoch": 1, "loss": 2.0, "samples_per_s": 3.0}]) == [
        "epoch  loss A  loss B  eval_auc A  eval_auc B",
        "    1  1.0000  2.0000  0.5000      —",
        "    2  0.5000  —       0.7500      —",
    ]


def test_the_command_that_goes_on_repeats_what_changes_the_job(capsys: pytest.CaptureFixture[str]) -> None:
    display = Display()
    observe = _with_resume_command(display, "my net.py:job", ["batch_size=7"], 3, Path("a.csv"))
    observe({"kind": "run_start", "run": "runs/x", "job": "net"})
    observe({"kind": "run_end", "status": "stopped", "steps": 3, "epochs": 0})
    assert capsys.readouterr().err.splitlines()[-1] == (
        "go on with: shoal train 'my net.py:job' --set batch_size=7 --seed 3 --data a.csv --run runs/x --resume"
    )


def test_quiet_shows_what_a_person_must_know(capsys: pytest.CaptureFixture[str]) -> None:
    observe = _Quieted(Display())
    observe({"kind": "run_start", "run": "runs/x", "job": "net"})
    observe({"kind": "epoch", "epoch": 1, "loss": 1.0})
    observe({"kind": "warning", "text": "four workers on two cores"})
    assert capsys.readouterr().err == "warning: four workers on two cores\n"


def test_a_finished_run_is_shown_from_what_it_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    history = [{"epoch": 1, "loss": 1.0, "eval_auc": 0.75}]
    trained = types.SimpleNamespace(path=tmp_path, history=history, plan="dp=2", summary=lambda: {"job": "net"})
    display = Display()
    _tell_finished(display, trained)
    _draw(display, trained)
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith(f"{tmp_path} is finished already;")
    assert said[1:] == ["epoch 1  loss 1.0000  eval_auc 0.7500", f"picture: {tmp_path / 'learning_curve.png'}"]
    assert Image.open(tmp_path / "learning_curve.png").format == "PNG"
    trained.path = tmp_path / "missing"
    _draw(display, trained)  # a picture that cannot be drawn does not fail a run
    assert capsys.readouterr().err.startswith("warning: the learning curve was not drawn")
