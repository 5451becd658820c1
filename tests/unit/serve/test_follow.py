"""What a follower takes from a run's directory, and when: updates while there are any, else checkpoints that are newer."""

from __future__ import annotations

import json
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path

import pytest

from shoal.errors import RequestError
from shoal.serve.follow import Follower


class Run:
    def __init__(self, path: Path) -> None:
        self.path = path
        (path / "events.jsonl").touch()
        (path / "checkpoints").mkdir()

    def describe(self) -> None:
        (self.path / "checkpoints" / "bundle.json").write_text("{}")

    def checkpoint(self, step: int) -> None:
        place = self.path / "checkpoints" / f"step-{step}"
        place.mkdir()
        (place / "meta.json").write_text(json.dumps({"step": step}))

    def publish(self) -> None:
        # As a resumed run does: a new file in the place of the old one.
        scratch = self.path / "scratch"
        scratch.write_text("")
        scratch.replace(self.path / "read.key")

    def finish(self) -> None:
        (self.path / "model").mkdir()
        (self.path / "model" / "bundle.json").write_text("{}")


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path)


class Taker:
    """Loads nothing, and says when it is told to that it has."""

    def __init__(self, run: Run) -> None:
        self.asked: list[str] = []
        self.said: list[str] = []
        self.done: Callable[[str | None], None] = lambda trouble: None
        self.refuses = False
        # Each time that the run is listened for; to be answered.
        self.asked_for: list[Future[bool]] = []
        self.follower = Follower(run.path, self.load, self.said.append, None, self.listen)
        self._now = 0.0

    def load(self, path: Path, done: Callable[[str | None], None]) -> None:
        self.asked.append(path.name)
        self.done = done
        if self.refuses:
            raise RequestError("Not now.")

    def listen(self, run: Path) -> Future[bool]:
        self.asked_for.append(Future())
        return self.asked_for[-1]

    def look(self, later_s: float = 10.0) -> list[str]:
        """What is asked for when it looks again."""
        before = len(self.asked)
        self._now += later_s
        self.follower.look(self._now)
        return self.asked[before:]


def test_updates_are_followed_and_checkpoints_wait(run: Run) -> None:
    taker = Taker(run)
    run.publish()
    assert taker.look() == []
    run.describe()
    assert taker.look() == ["read.key"]
    run.checkpoint(1)
    assert taker.look() == []
    taker.done(None)
    assert taker.said[-1].endswith("answers now, and follows its updates.")
    assert taker.look() == []
    # The run is lost: what is served is newer than the checkpoint.
    taker.follower.lost("Nothing was heard of it.")
    assert taker.look() == []
    run.checkpoint(2)
    assert taker.look() == ["step-2"]
    taker.done(None)
    run.publish()
    assert taker.look() == ["read.key"]
    taker.done(None)
    (run.path / "read.key").unlink()
    run.finish()
    assert taker.look() == []
    taker.follower.lost("The run has ended.", True)
    assert taker.look() == ["model"] and taker.follower.losses == 1


def test_a_run_that_cannot_be_heard_is_followed_by_its_checkpoints(run: Run) -> None:
    taker = Taker(run)
    run.describe()
    run.checkpoint(1)
    run.publish()
    assert taker.look() == ["read.key"]
    taker.done("Nobody answers.")
    assert "what its servers have now was not taken. Nobody answers." in taker.said[-1]
    # The key of a run that is gone is not tried again.
    assert taker.look() == ["step-1"]
    taker.done(None)
    assert taker.look() == []
    run.publish()
    taker.refuses = True
    assert taker.look() == ["read.key"] and "Not now." in taker.said[-1]
    assert taker.look() == []


def test_a_run_that_was_lost_is_listened_for_ever_more_rarely_and_followed_again(run: Run) -> None:
    taker = Taker(run)
    run.describe()
    run.publish()
    assert taker.look() == ["read.key"]
    taker.done(None)
    assert taker.look() == [] and not taker.asked_for
    taker.follower.lost("Nothing was heard of it for 5 s.")
    heard_at = []
    for second in range(200):
        taker.look(1.0)
        if taker.asked_for and not taker.asked_for[-1].done():
            heard_at.append(second)
            taker.asked_for[-1].set_result(False)
    pauses = [b - a for a, b in zip(heard_at, heard_at[1:], strict=False)]
    assert pauses == sorted(pauses) and pauses[0] <= 4 and 60 <= pauses[-1] <= 62
    assert taker.follower.numbers() == {"run": run.path.name, "by": "checkpoints", "lost": 1, "tries": len(heard_at)}
    # A checkpoint that is newer is taken all the same.
    run.checkpoint(1)
    assert taker.look(1.0) == ["step-1"]
    taker.done(None)
    taker.look(61.0)
    taker.asked_for[-1].set_result(True)
    assert taker.look() == ["read.key"] and taker.said[-1].endswith("is heard again.")
    taker.done(None)
    assert taker.follower.numbers()["by"] == "updates" and taker.look() == []
    # Heard, and not to be taken: that is not tried for ever.
    taker.follower.lost("Nothing was heard of it for 5 s.")
    for _ in range(20):
        if taker.look(61.0):
            taker.done("It cannot be copied.")
        if not taker.asked_for[-1].done():
            taker.asked_for[-1].set_result(True)
    assert taker.asked.count("read.key") == 5 and taker.follower.losses == 2


def test_what_is_loaded_anew_has_its_weights_from_the_run(run: Run, tmp_path: Path) -> None:
    taker = Taker(run)
    beside = (run.path / "checkpoints").resolve()
    run.describe()
    with pytest.raises(RequestError, match="has no checkpoint yet"):
        taker.follower.weights_for(beside)
    run.checkpoint(3)
    assert taker.follower.weights_for(beside) == (beside / "step-3", None)
    assert taker.follower.weights_for(tmp_path / "elsewhere") == (None, None)
    run.publish()
    taker.look()
    taker.done(None)
    assert taker.follower.weights_for(beside) == (None, run.path.resolve())
    # Loaded anew, and not another one: a model whose description came from elsewhere keeps up with the run, too.
    assert taker.follower.weights_for(tmp_path / "elsewhere", named=False) == (None, run.path.resolve())
    taker.follower.lost("Nothing was heard of it.")
    assert taker.follower.weights_for(tmp_path / "elsewhere", named=False) == (beside / "step-3", None)
