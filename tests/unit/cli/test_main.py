from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from shoal.cli import commands
from shoal.cli.answer import Answer
from shoal.cli.main import main
from shoal.cli.options import JsonFlag
from shoal.errors import JobFailed, UserCodeError

ROOT = Path(__file__).parents[3]


def shoal(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "shoal", *arguments], capture_output=True, text=True, timeout=200, env=environment
    )


def with_command(monkeypatch: pytest.MonkeyPatch, body: Callable[[], Answer]) -> None:
    """Put a command called ``try`` into the real command line."""

    def attempt(json: JsonFlag = False) -> Answer:
        """Try."""
        return body()

    monkeypatch.setattr(commands, "COMMANDS", (commands.Command(name="try", function=attempt),))


def test_help_lists_every_command_and_says_which_are_not_built() -> None:
    done = shoal("--help")
    assert done.returncode == 0 and done.stderr == ""
    lines = {line.split()[0]: line for line in done.stdout.split("Commands:")[1].strip().splitlines()}
    not_built = {name for name, line in lines.items() if "(not built yet)" in line}
    assert not_built == {"compress"}
    built = {"plan", "train", "replan", "eval", "predict", "compare", "serve", "route", "load", "runs", "data", "doctor"}
    assert set(lines) - not_built == built
    assert shoal().stdout == done.stdout


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from shoal.cli.main import main; assert main(['--help']) == 0;"
        "print(sorted({'torch', 'numpy', 'rich', 'matplotlib', 'psutil', 'tensorboardX'} & set(sys.modules)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=200, env=environment)
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["trian"], 'There is no command "trian". Did you mean "train"'),
        (["train", "net", "--epoks", "3"], 'shoal train has no option --epoks. Did you mean "--epochs"'),
        (["--jsn"], "shoal has no option --jsn."),
        (["train"], "Missing argument 'TARGET'. See shoal train --help."),
        (["train", "net", "--epochs", "many"], "--epochs is many; give a whole number."),
        (["train", "net", "--epochs=1.5"], "--epochs is 1.5; give a whole number."),
        (["train", "net", "--epochs"], "--epochs needs a value. See shoal train --help."),
        (["train", "net", "--epochs", "0"], "--epochs is 0; give a whole number of at least 1."),
        (["train", "net", "--steps", "-3"], "--steps is -3; give a whole number of at least 1."),
        (["train", "net", "--json=yes"], "Option '--json' does not take a value. See shoal train --help."),
        (["train", "cifar-cn"], 'There is no job called "cifar-cn". Did you mean "cifar-cnn"'),
        (["train", "cifar-cnn", "--plan", "dq=2"], 'Did you mean "dp"'),
        (["train", "cifar-cnn", "--plan", ""], '--plan is empty; give a plan such as "dp=2", or auto.'),
        (["train", "cifar-cnn", "--set", "optimizer=sgd"], '--set cannot change "optimizer".'),
        (["train", "cifar-cnn", "--memory-limit", "lots"], "2GB"),
        (["train", "cifar-cnn", "--cluster", "missing.toml"], "missing.toml"),
        (["train", "cifar-cnn", "--data", "missing.csv"], "missing.csv"),
        (["train", "missing.py:job"], "There is no file missing.py."),
        (["serve", "model", "--port", "80"], "There is no bundle at model"),
        (["route", "127.0.0.1:1", "127.0.0.1:1"], "is there twice"),
        (["predict", "model"], "Missing argument 'DATA'. See shoal predict --help."),
        (["predict", "model", "a.csv"], "There is no bundle at model"),
        (["compress", "model", "--json"], "shoal compress is not built yet;"),
        (["load", "ftp://localhost"], "only http:// and https:// are spoken here"),
        (["data", "cifar"], 'There is no data set called "cifar". Did you mean "cifar10"'),
        (["runs", "nowhere"], "There is no directory nowhere;"),
        (["runs", "a", "b"], "Got unexpected extra argument"),
    ],
)
def test_a_request_that_makes_no_sense_is_one_sentence_and_exit_2(
    arguments: list[str],
    sentence: str,
    capfd: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(arguments) == 2
    said = capfd.readouterr().err
    assert said.count("\n") == 1 and sentence in said and said.endswith(".\n"), said


def test_the_users_own_error_shows_their_traceback_marked_as_theirs(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.py").write_text("def build():\n    return 1 / 0\n\n\njob = build()\n")
    assert main(["train", str(tmp_path / "mine.py") + ":job"]) == 1
    out, said = capfd.readouterr()
    lines = said.splitlines()
    assert out == "" and lines[0] == "your code raised:"
    assert any("return 1 / 0" in line for line in lines)
    assert "ZeroDivisionError" in said and str(ROOT / "shoal") not in said
    assert not lines[-1].startswith(" ") and lines[-1].endswith(".")


def test_a_worker_is_named_with_the_traceback(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def body() -> Answer:
        raise UserCodeError("The loss raised KeyError; see above.", "Traceback …\nKeyError: 'x'\n", rank=1)

    with_command(monkeypatch, body)
    assert main(["try"]) == 1
    expected = "your code raised, in worker 1:\nTraceback …\nKeyError: 'x'\nThe loss raised KeyError; see above.\n"
    assert capfd.readouterr().err == expected


def test_a_bug_is_one_sentence_and_the_traceback_lies_in_a_file(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def body() -> Answer:
        raise KeyError("two\nlines")

    with_command(monkeypatch, body)
    with monkeypatch.context() as patched:
        patched.setattr(tempfile, "tempdir", str(tmp_path))
        assert main(["try"]) == 1
    (file,) = tmp_path.iterdir()
    said = capfd.readouterr().err
    assert said.startswith("This is a bug in shoal (KeyError: ")
    assert said.endswith(f"{file}.\n") and said.count("\n") == 1
    assert "raise KeyError" in file.read_text()
    # Not even room for that: then the traceback comes first, the sentence still last.
    with monkeypatch.context() as patched:
        patched.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
        assert main(["try"]) == 1
    said = capfd.readouterr().err
    assert said.startswith("Traceback") and said.splitlines()[-1].startswith("This is a bug in shoal")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupt_is_130_and_sigterm_is_one(
    number: signal.Signals, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def body() -> Answer:
        os.kill(os.getpid(), number)
        return Answer({}, ["not reached"])

    before = signal.getsignal(signal.SIGTERM)
    with_command(monkeypatch, body)
    assert main(["try"]) == 130
    assert capfd.readouterr() == ("", "Interrupted.\n")
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_script_that_exits_is_told_from_shoal(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text("import sys\nsys.exit(0)\n")
    assert main(["train", str(tmp_path / "mine.py") + ":job"]) in (1, 2)
    assert "exit" in capfd.readouterr().err.lower()


def test_with_json_standard_output_holds_one_object_whatever_else_is_printed(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def body() -> Answer:
        print("printed")
        os.write(1, b"written to the descriptor\n")
        subprocess.run(["echo", "by a child"], check=True)
        return Answer({"loss": float("nan"), "steps": 3}, ["for people"])

    with_command(monkeypatch, body)
    assert main(["try", "--json"]) == 0
    out, err = capfd.readouterr()
    assert json.loads(out) == {"loss": None, "steps": 3} and out.count("\n") == 1
    assert {"printed", "written to the descriptor", "by a child"} <= set(err.splitlines())
    print("afterwards")
    assert main(["try"]) == 0
    assert capfd.readouterr().out.endswith("by a child\nfor people\n")


def test_with_json_an_error_is_an_object_too(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def body() -> Answer:
        raise JobFailed("The loss became NaN\nin step 3.")

    with_command(monkeypatch, body)
    assert main(["try", "--json"]) == 1
    out, err = capfd.readouterr()
    assert json.loads(out) == {"error": "The loss became NaN in step 3.", "exit_code": 1}
    assert err == "The loss became NaN in step 3.\n"
    assert main(["try", "--json", "--nonsense"]) == 2
    assert json.loads(capfd.readouterr().out)["exit_code"] == 2


def test_a_reader_that_goes_away_is_no_error() -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    reading, writing = os.pipe()
    os.close(reading)
    process = subprocess.Popen(
        [sys.executable, "-m", "shoal", "data"], stdout=writing, stderr=subprocess.PIPE, env=environment
    )
    os.close(writing)
    said = process.communicate(timeout=200)[1]
    assert (process.returncode, said) == (0, b"")


def test_version() -> None:
    done = shoal("--version")
    assert done.returncode == 0 and done.stdout.startswith("shoal ")
