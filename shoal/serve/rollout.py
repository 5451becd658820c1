"""A new version of a model on its way in: loaded beside the old one, tried through its own queue, watched, then given requests.

At no moment is there nobody who answers: the old version leaves only when the new one has the requests, and finishes what it had.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from typing import Any

from shoal.errors import RequestError, ShoalError
from shoal.serve.crew import Crew

_SLOWER_MS = 2.0
_LARGEST = 1_000_000_000


@dataclass(frozen=True, kw_only=True)
class Trial:
    """How a new version is tried before it gets all requests. Neither: it gets them once its first answer was right.

    Attributes:
        canary: the share of the requests that it answers meanwhile, above 0 and below 1.
        shadow: whether it is asked what the old one is asked, and its answers only compared.
        requests: how many answers decide.
        tolerance: with ``shadow``, the largest difference allowed between the answers; None allows any.
        slower: how many times the 95th percentile of the old one its own may be, and 2 ms more.
    """

    canary: float | None = None
    shadow: bool = False
    requests: int = 200
    tolerance: float | None = None
    slower: float = 1.5

    def check(self) -> None:
        """RequestError where that makes no sense."""
        if self.canary is not None and self.shadow:
            raise RequestError("A new version is either a canary or a shadow; give one of them.")
        if self.canary is not None and not 0 < self.canary < 1:
            raise RequestError(f"The canary's share is {self.canary:g}; give a share between 0 and 1, such as 0.1.")
        if self.requests < 1:
            raise RequestError(f"{self.requests} requests cannot decide anything; give at least 1.")
        if self.tolerance is not None and not (self.shadow and self.tolerance >= 0):
            raise RequestError("A tolerance is a number from 0 for the answers of a shadow; give shadow as well.")
        if not self.slower > 0:
            raise RequestError(f"slower is {self.slower:g}; give a factor above 0, such as 1.5.")

    @classmethod
    def from_parameters(cls, parameters: Mapping[str, Any]) -> Trial:
        """From what a client sends along. RequestError where it is something else."""
        kinds: dict[str, tuple[type, ...]] = {
            "canary": (int, float), "shadow": (bool,), "requests": (int,), "tolerance": (int, float),
            "slower": (int, float),
        }  # fmt: skip
        for name, value in parameters.items():
            if name not in kinds:
                raise RequestError(f"A model is not loaded with {name[:40]}; there is {', '.join(kinds)}.")
            if not isinstance(value, kinds[name]) or (isinstance(value, bool) and name != "shadow"):
                raise RequestError(f"The parameter {name} is a {kinds[name][-1].__name__}.")
            # A whole number in JSON may be longer than a float holds.
            if isinstance(value, (int, float)) and abs(value) > _LARGEST:
                raise RequestError(f"The parameter {name} is beyond {_LARGEST:,}.")
        trial = cls(**parameters)
        trial.check()
        return trial

    def verdict(self, seen: Mapping[str, Any], old: Mapping[str, Any]) -> str | None:
        """What a trial came to: "" to promote, a sentence to roll back, None while too little was seen.

        ``seen``: numbers of the trial, ``old``: those of the version that answers (``Shelf.numbers``). The rule: none of its
        requests failed; its 95th percentile is at most ``slower`` times the old one's and 2 ms; no answer differs by more than
        the tolerance.
        """
        if seen["failed"]:
            return f"{seen['failed']} of its requests failed"
        if self.tolerance is not None and seen["worst_difference"] > self.tolerance:
            return f"an answer is {seen['worst_difference']:.3g} away from the old one, more than {self.tolerance:g}"
        if seen["answered"] < self.requests:
            return None
        before = seen.get("p95_ms_active", old["p95_ms"])
        if seen["p95_ms"] > self.slower * before + _SLOWER_MS:
            return f"its 95th percentile is {seen['p95_ms']:.1f} ms, the old one's {before:.1f} ms"
        return ""


class Stage(Enum):
    LOADING = "loading"
    PROBING = "probing"
    TRYING = "trying"
    IN = "in"
    FAILED = "failed"


class Rollout:
    """One new version. The thread of the service moves it on; ``wait`` may be called from any other."""

    def __init__(self, crew: Crew, old: Crew | None, trial: Trial, done: Callable[[str | None], None]) -> None:
        """``done`` is called, from the service's thread, with None or with a sentence that says why not."""
        self.crew = crew
        self.trial = trial
        self.stage = Stage.LOADING
        self._old = old
        self._done = done
        self._trouble: str | None = None
        self._thread = threading.Thread(target=self._load, name="shoal-load", daemon=True)

    def start(self) -> None:
        """Begin to load; the template is started here, by the thread that lives as long as it does."""
        self.crew.start()
        self._thread.start()

    def _load(self) -> None:
        try:
            self.crew.load(like=self._old)
            if self._old is not None:
                self._must_fit(self._old)
            self.crew.choose(like=self._old)
        except ShoalError as error:
            self._trouble = str(error)
        except Exception as error:
            self._trouble = f"The model could not be loaded: {type(error).__name__}."

    def _must_fit(self, old: Crew) -> None:
        new, before = self.crew.signature, old.signature
        if (new.inputs, new.outputs) != (before.inputs, before.outputs):
            raise RequestError(
                f"The new version of {new.name} takes or gives other tensors than the one that answers; "
                "serve it under another name."
            )

    def loaded(self) -> bool:
        """Whether loading has ended; RequestError where it ended badly."""
        if self._thread.is_alive():
            return False
        if self._trouble is not None:
            raise RequestError(self._trouble)
        return True

    def end(self, trouble: str | None) -> None:
        """It is in, or it is not and why."""
        self.stage = Stage.IN if trouble is None else Stage.FAILED
        self._done(trouble)

    def join(self) -> None:
        """Wait for the thread that loads; for when the service ends."""
        self._thread.join()
