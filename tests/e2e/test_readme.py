"""The README's own commands, run one after the other on the README's own example.

(That the example runs as a script, and that both READMEs show the same code, is tested in tests/unit/test_docs.py.)
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

import shoal
from shoal.cli.main import main

ROOT = Path(__file__).resolve().parents[2]


def _blocks(language: str) -> list[str]:
    """The code of the README's blocks in a language, without what a comment marks as not to be run."""
    text = re.sub(r"<!-- not-run -->\n*```.*?^```$", "", (ROOT / "README.md").read_text(), flags=re.M | re.S)
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def _commands() -> list[list[str]]:
    lines = [line for block in _blocks("bash") for line in block.splitlines() if line.startswith("shoal ")]
    return [shlex.split(line, comments=True)[1:] for line in lines]


def test_the_commands_run_on_the_example(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SHOAL_EXPORT", "0")
    example = _blocks("python")[0]
    (tmp_path / "train_mine.py").write_text(example)
    done = []
    for words in _commands():
        if "cifar-cnn" in words:  # needs the real data set
            continue
        if "text-transformer" in words:  # a shipped job, whose epochs take minutes
            words = [*words, "--steps", "2"]
        elif words[0] == "train" and "--plan" not in words and "--resume" not in words:
            words = [*words, "--epochs", "1"]  # the search for a plan is what this one shows
        code = main(words)
        out, err = capfd.readouterr()
        assert code == 0, (words, err)
        done.append((words, out + err))
    assert len(done) >= 3
    trained = [(words, said) for words, said in done if words[0] == "train"]
    for words, said in trained:
        assert "my-net" in said or "--resume" in words or "text-transformer" in words
    learned = []
    for words, _ in trained:
        if "--run" in words and "--epochs" in words:
            run = shoal.open(words[words.index("--run") + 1])
            assert len(run.history) == int(words[words.index("--epochs") + 1])
            learned.append(run.history[-1]["eval_accuracy"])
    assert learned and min(learned) > 0.9, "the example is one that is learned"
    assert "my-net" in dict((words[0], said) for words, said in done)["runs"]
