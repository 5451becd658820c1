"""Every error that shoal raises on purpose, in one tree.

    ShoalError
    ├── RequestError                 the request makes no sense; exit code 2
    │   ├── PlanError                a plan string or a plan that does not fit the job or the machine
    │   ├── TargetError              the job, run or bundle that was asked for cannot be found
    │   ├── JobError                 the job itself is not one that can be run
    │   ├── DataError                data that is missing, damaged or of the wrong shape
    │   └── RunDirectoryError        a run directory that exists, is missing, or cannot be written
    ├── JobFailed                    the job was sound but failed while it ran; exit code 1
    │   ├── UserCodeError            the user's own code raised; carries their traceback
    │   ├── LossNotFiniteError       the loss became NaN or infinite
    │   ├── WorkerLostError          a worker died too often on the same step
    │   └── DeadlineError            something waited longer than it may; says for whom
    └── NotBuiltError                a part of the contract that this version does not do yet; exit code 2

The message of each is one sentence for the person at the terminal: what is wrong and what to do about it.
This module imports nothing from shoal, so every room may import it.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ShoalError(Exception):
    """The root: whatever shoal raises on purpose is one of these."""

    exit_code = 1


class RequestError(ShoalError):
    """The request makes no sense as it stands."""

    exit_code = 2


class PlanError(RequestError):
    """A plan that cannot be read, or that does not fit the job or the machine."""


class TargetError(RequestError):
    """A job, run directory or bundle that cannot be found."""


class JobError(RequestError):
    """A job that cannot be run as it was written."""


class DataError(RequestError):
    """Data that is missing, damaged or of the wrong shape; names the file and the row."""


class RunDirectoryError(RequestError):
    """A run directory that exists already, is missing, or cannot be written."""


class NotBuiltError(RequestError):
    """Part of the contract that this version does not do yet."""


class JobFailed(ShoalError):
    """The job was sound but failed while it ran."""


class UserCodeError(JobFailed):
    """The user's own code raised.

    Attributes:
        traceback_text: their traceback, as Python prints it, shoal's own frames left out.
        rank: the worker it happened on, or None outside a worker.
    """

    def __init__(self, message: str, traceback_text: str = "", rank: int | None = None) -> None:
        super().__init__(message)
        self.traceback_text = traceback_text
        self.rank = rank


class LossNotFiniteError(JobFailed):
    """The loss became NaN or infinite; names the step, the samples and the last good checkpoint."""


class WorkerLostError(JobFailed):
    """A worker died too often on the same step."""


class DeadlineError(JobFailed):
    """A wait ran out; the message says for whom and what that one was doing."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ' Did you mean "x"?' for the nearest known words, or '' where nothing is near."""
    near = difflib.get_close_matches(word, list(known), n=3, cutoff=0.5)
    if not near:
        return ""
    return " Did you mean " + " or ".join(f'"{name}"' for name in near) + "?"
