"""Errors that cross a process boundary, and telling the user's own errors from ours."""

from __future__ import annotations

import sys
import traceback
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from shoal import errors

_SHOAL = str(Path(errors.__file__).parent)


@dataclass(frozen=True)
class Failure:
    """An exception as a message: the class's name in ``shoal.errors``, its sentence, the user's traceback."""

    kind: str
    sentence: str
    traceback_text: str = ""
    rank: int | None = None

    @classmethod
    def of(cls, error: BaseException, rank: int | None = None) -> Failure:
        """Describe an exception; one that is not shoal's own is a bug of ours and keeps its whole traceback."""
        if isinstance(error, errors.UserCodeError):
            return cls("UserCodeError", str(error), error.traceback_text, rank)
        if isinstance(error, errors.ShoalError):
            return cls(type(error).__name__, str(error), rank=rank)
        text = "".join(traceback.format_exception(type(error), error, error.__traceback__))
        return cls("", f"{type(error).__name__}: {error}", text, rank)

    def error(self) -> BaseException:
        """The exception again, to be raised."""
        if self.kind == "UserCodeError":
            return errors.UserCodeError(self.sentence, self.traceback_text, self.rank)
        if self.kind:
            known = getattr(errors, self.kind, errors.JobFailed)
            raised: BaseException = known(self.sentence)
            return raised
        return RuntimeError(f"{self.sentence}\n{self.traceback_text}")


def user_code(what: str, rank: int | None = None) -> AbstractContextManager[None]:
    """Whatever is raised inside, other than shoal's own errors, is the user's: UserCodeError with their traceback.

    ``what`` names the place in the job: "the loss", "train_data".
    """
    return _UserCode(what, rank)


class _UserCode:
    # Not a generator: a step enters half a dozen of these, and each would take three times as long.
    __slots__ = ("_rank", "_what")

    def __init__(self, what: str, rank: int | None) -> None:
        self._what, self._rank = what, rank

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        if error is None or isinstance(error, (errors.ShoalError, KeyboardInterrupt, SystemExit, GeneratorExit)):
            return
        where = "" if self._rank is None else f" in worker {self._rank}"
        text = "".join(traceback.format_exception(type(error), error, _without_shoal(tb)))
        raise errors.UserCodeError(
            f"{self._what} raised {type(error).__name__}{where}: {first_line(error)}.", text, self._rank
        ) from None


def first_line(error: BaseException) -> str:
    """What an error says, as a part of a sentence: its first line, without a full stop."""
    lines = str(error).strip().splitlines()
    return (lines[0] if lines else "no message").rstrip(".")


def _without_shoal(tb: TracebackType | None) -> TracebackType | None:
    """Leave out shoal's own frames at a traceback's beginning, and torch's between them, unless nothing remains."""
    torch = getattr(sys.modules.get("torch"), "__file__", None)
    not_theirs = (_SHOAL, str(Path(torch).parent)) if torch else (_SHOAL,)
    at, rest = tb, tb
    while at is not None and at.tb_frame.f_code.co_filename.startswith(not_theirs):
        if at.tb_frame.f_code.co_filename.startswith(_SHOAL):
            rest = at.tb_next
        at = at.tb_next
    return rest or tb
