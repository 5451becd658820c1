"""Following a run in training: by what its servers publish, or each new checkpoint becomes the next version of the model.

A run under a parameter server has a key in its directory while it trains (``ps/keys.py``). Then its weights are read as they
change (``serve/live.py``), as one version. Where there is none, or the run is heard no more, it is checkpoints: but none that is
older than what is served, so a run that is lost leaves the service with its last weights until it is heard again, is resumed or
has ended. It is listened for with longer and longer pauses.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

from shoal import bundle
from shoal.errors import DeadlineError, RequestError, TargetError
from shoal.ps.keys import READ_KEY

_LOOK_EVERY_S = 1.0
_BEGIN_S = 60.0
_HEAR_S = 5.0
# Between two times that a run which was lost is listened for; and how often its weights may not be taken though it is heard.
_PAUSE_S, _LONGEST_PAUSE_S = 1.0, 60.0
_MOST_FAILURES = 3
_NO_RUN = "{} is not the directory of a run; give the one that shoal train named."

Load = Callable[[Path, Callable[["str | None"], None]], None]
"""Begins to load a checkpoint or a bundle, and calls back with None, or with why it did not come in."""
Listen = Callable[[Path], "Future[bool]"]
"""Begins to find out whether somebody publishes a run's weights."""


def listen(run: Path) -> Future[bool]:
    """Ask who publishes a run's weights whether it is there, in a thread that ends by itself."""
    found: Future[bool] = Future()

    def ask() -> None:
        # What speaks ZeroMQ is loaded where a run is followed by its updates, and nowhere else.
        from shoal.ps.reader import answers

        try:
            found.set_result(answers(run, _HEAR_S))
        except Exception:
            found.set_result(False)

    threading.Thread(target=ask, name="shoal-listen", daemon=True).start()
    return found


class Follower:
    """Watches the directory of one run. ``look`` is called now and then, and begins a load where there is something newer."""

    def __init__(
        self, run: Path, load: Load, say: Callable[[str], None], served: Path | None, listen: Listen = listen
    ) -> None:
        """``say`` is told, in a sentence, what became of each checkpoint; ``served``: what answers already, None for nothing.

        TargetError where ``run`` is no run's directory.
        """
        if not (run / "events.jsonl").is_file():
            raise TargetError(_NO_RUN.format(run))
        self._run = run.resolve()
        self._load = load
        self.say = say
        self._taken = served
        # The key that was tried last, and whether weights follow the run by it now.
        self._key: tuple[int, int] | None = None
        self._follows = False
        self._busy = False
        # How often the run was heard no more, and how often it was listened for since.
        self.losses = self.tries = 0
        self._listen = listen
        self._lost = False
        self._asked: Future[bool] | None = None
        self._failures = 0
        self._listen_at = float("-inf")
        self._looked_s = float("-inf")

    def look(self, now_s: float) -> None:
        """See whether there is a newer checkpoint, or the finished model, and begin to load it; ``now_s``: of a steady clock."""
        if self._busy or now_s - self._looked_s < _LOOK_EVERY_S:
            return
        self._looked_s = now_s
        key = self._find_key()
        if key is not None and key != self._key and (self._taken is not None or describes(self._run)):
            self._key, self._failures = key, 0
            return self._begin(self._run / READ_KEY)
        if self._follows:
            return
        if self._lost and key is not None and self._hears(now_s):
            self.say(f"{self._run}: it is heard again.")
            return self._begin(self._run / READ_KEY)
        found = newest(self._run)
        if found is None or found == self._taken:
            return
        if self._taken is None and found.name != "model" and not describes(self._run):
            return
        self._taken = found
        self._begin(found)

    def weights_for(self, source: Path, named: bool = True) -> tuple[Path | None, Path | None]:
        """Where the weights are of what is loaded from ``source``: (a checkpoint, a run to be followed by its updates).

        Neither where it has its own; ``named``: somebody wants these, and not only the model anew. RequestError where there are
        none yet.
        """
        own = (source / bundle.WEIGHTS).exists() or source.resolve() != checkpoints_of(self._run)
        if own and named:
            return None, None
        if self._follows:
            return None, self._run
        found = newest(self._run)
        if own and (found is None or found.name == "model"):
            return None, None
        if found is None:
            raise RequestError(f"The run {self._run.name} has no checkpoint yet that could be loaded.")
        return found, None

    def lost(self, reason: str, ended: bool = False) -> None:
        """The weights follow the run no more; what they are now is newer than any checkpoint that there is.

        ``ended``: the run has said that this was all.
        """
        self._follows = False
        if not ended:
            self.losses += 1
            self._look_for_it()
        found = newest(self._run)
        if found is not None and found.name != "model":
            self._taken = found
        self.say(f"{self._run}: its updates come no more. {reason}")

    def numbers(self) -> dict[str, Any]:
        """What is followed, and by what; how often its updates were lost, and how often it was listened for since."""
        by = "updates" if self._follows else "checkpoints"
        return {"run": self._run.name, "by": by, "lost": self.losses, "tries": self.tries}

    def _look_for_it(self) -> None:
        self._lost, self._asked, self._listen_at, self.tries = True, None, float("-inf"), 0

    def _hears(self, now_s: float) -> bool:
        """Whether a run that was lost has been heard; else listen for it now and then."""
        if self._asked is not None:
            if not self._asked.done():
                return False
            heard, self._asked = self._asked.result(), None
            self._listen_at = now_s + min(_LONGEST_PAUSE_S, _PAUSE_S * 2**self.tries)
            return heard
        if now_s >= self._listen_at:
            self.tries += 1
            self._asked = self._listen(self._run)
        return False

    def _begin(self, found: Path) -> None:
        self._busy, self._follows = True, False
        try:
            self._load(found, partial(self._ended, found))
        except RequestError as error:
            self._ended(found, str(error))

    def _ended(self, found: Path, trouble: str | None) -> None:
        self._busy = False
        live = found.name == READ_KEY
        self._follows = live and trouble is None
        if self._follows:
            self._lost, self._failures = False, 0
        elif live and not self._lost:
            self._look_for_it()
        elif live:
            # Heard, and not taken all the same: sooner or later that is for good.
            self._failures += 1
            self._lost = self._failures < _MOST_FAILURES
        name = {"model": "the finished model", READ_KEY: "what its servers have now"}.get(found.name, found.name)
        if trouble is not None:
            self.say(f"{self._run}: {name} was not taken. {trouble}")
        else:
            self.say(f"{self._run}: {name} answers now" + (", and follows its updates." if live else "."))

    def _find_key(self) -> tuple[int, int] | None:
        """What tells the key of a run apart from that of the run that it goes on from."""
        try:
            found = (self._run / READ_KEY).stat()
        except OSError:
            return None
        return found.st_ino, found.st_mtime_ns


def checkpoints_of(run: Path) -> Path:
    """Where a run says how to build its model while it goes on: a bundle without weights."""
    return run / "checkpoints"


def describes(run: Path) -> bool:
    """Whether a run has said yet how to build its model."""
    return (checkpoints_of(run) / bundle.DESCRIPTION).is_file()


def job_of(run: Path) -> str:
    """The name of the job that a run trains, waited for where the run is only preparing its first step.

    TargetError where ``run`` is no run's directory, DeadlineError where it does not begin.
    """
    if not (run / "events.jsonl").is_file():
        raise TargetError(_NO_RUN.format(run))
    until = time.monotonic() + _BEGIN_S
    while True:
        try:
            return str(json.loads((run / "job.json").read_text())["name"])
        except (OSError, ValueError, KeyError, TypeError):
            if time.monotonic() > until:
                raise DeadlineError(f"The run {run} did not begin within {_BEGIN_S:g} s; is it still there?") from None
            time.sleep(0.1)


def newest(run: Path) -> Path | None:
    """The finished model of a run, else its latest whole checkpoint, else None."""
    if (run / "model" / bundle.DESCRIPTION).is_file():
        return run / "model"
    steps: list[tuple[int, Path]] = []
    for path in (run / "checkpoints").glob("step-*"):
        try:
            steps.append((int(json.loads((path / "meta.json").read_text())["step"]), path))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return max(steps)[1] if steps else None
