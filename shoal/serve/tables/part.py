"""A file of answers while it grows, so that whoever is killed can be started again and go on.

Answers are appended to ``FILE.part``. Beside it a hidden note says how many rows and bytes of it are sound, and of what model
and data they are; it is written about twice a second, whole or not at all. What lies behind the last note is cut off and answered
again. At the end FILE appears by one rename. The note stays, so that the same command given again finds that all is done.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from shoal.cluster.cache import read_json, write_json
from shoal.errors import JobFailed, RequestError
from shoal.serve.tables.answers import Format

_COMMIT_EVERY_S = 0.5


@dataclass(frozen=True)
class Note:
    """How far a file of answers is.

    Attributes:
        origin: what has to be the same to go on: how to say that it is not -> its value.
        rows, bytes: the part's first ``bytes`` hold ``rows`` answers.
        mark: the data's behind these rows, see ``Rows.mark``.
        out: the size of the finished file and its time of change in ns; None where it is not finished.
    """

    origin: dict[str, str]
    rows: int = 0
    bytes: int = 0
    mark: str = ""
    out: str | None = None

    @classmethod
    def read(cls, path: Path) -> Note | None:
        """The note in a file; None where there is none that can be read."""
        found = read_json(path)
        try:
            return None if found is None else cls(**found)
        except TypeError:
            return None

    def differs_by(self, origin: Mapping[str, str]) -> str | None:
        """What is not the same, in words, or None."""
        return next((words for words, value in origin.items() if self.origin.get(words) != value), None)


class PartFile:
    """``out`` on its way. One process at a time writes it; ``close`` lets go of it.

    Attributes:
        note: how far it is.
        finished_before: whether ``out`` is whole already; then there is nothing to write.
    """

    def __init__(self, out: Path, origin: Mapping[str, str], fresh: bool) -> None:
        """``origin``: see ``Note``. ``fresh``: begin again, whatever lies there.

        Raises:
            RequestError: what lies there is of something else, another process writes it, or nothing can be written there.
        """
        self.out = out
        self.path = out.with_name(out.name + ".part")
        self._note_path = out.with_name(f".{out.name}.predict.json")
        self.note = Note(dict(origin))
        if out.exists() and not out.is_file():
            raise RequestError(f"{out} is no plain file; give another --out.")
        if not out.parent.is_dir():
            raise RequestError(f"There is no directory {out.parent} for the answers; make it first.")
        self.finished_before = not fresh and not self.path.exists() and out.exists()
        if self.finished_before:
            self.note = self._finished_note()
        else:
            self._begin(fresh)
        self._rows, self._bytes = self.note.rows, self.note.bytes
        self._committed_s = time.monotonic()

    def _finished_note(self) -> Note:
        note = Note.read(self._note_path)
        if note is None or note.out != _stamp(self.out) or note.differs_by(self.note.origin):
            raise RequestError(f"{self.out} exists already; give --fresh to write it again, or another --out.")
        return note

    def _begin(self, fresh: bool) -> None:
        try:
            self._file = open(os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), "r+b")  # noqa: SIM115
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RequestError(f"Another process is writing {self.path}; wait for it, or give another --out.") from None
        except OSError as error:
            raise RequestError(f"{self.path} cannot be written ({error.strerror}); give another --out.") from None
        try:
            self._go_on(fresh)
        except OSError as error:
            raise self._failed(error) from None

    def _go_on(self, fresh: bool) -> None:
        size = os.fstat(self._file.fileno()).st_size
        if fresh or size == 0:
            # In this order: a note of more than there is would be refused the next time.
            self._file.truncate(0)
            write_json(self._note_path, asdict(self.note))
            return
        note = Note.read(self._note_path)
        if note is None or size < note.bytes:
            raise RequestError(f"Nothing says how far {self.path} is; give --fresh to begin again, or another --out.")
        other = note.differs_by(self.note.origin)
        if other is not None:
            raise self.mismatch(other)
        # Half a row may lie behind what the note vouches for.
        self._file.truncate(note.bytes)
        self._file.seek(note.bytes)
        self.note = note

    @property
    def is_empty(self) -> bool:
        """Whether nothing was appended yet, now or before."""
        return self._bytes == 0

    def mismatch(self, other: str) -> RequestError:
        """The error for what was begun with something else."""
        place = self.out if self.finished_before else self.path
        return RequestError(f"{place} was begun with {other}; give --fresh to begin again, or another --out.")

    def append(self, raw: bytes, rows: int, mark: str | None) -> None:
        """Append answers; ``mark``: the data's behind them, None where it is not known: then they are not noted yet."""
        try:
            self._file.write(raw)
        except OSError as error:
            raise self._failed(error) from None
        self._rows, self._bytes = self._rows + rows, self._bytes + len(raw)
        if mark is not None:
            self.note = replace(self.note, rows=self._rows, bytes=self._bytes, mark=mark, out=None)
            if time.monotonic() - self._committed_s > _COMMIT_EVERY_S:
                self.commit()

    def commit(self) -> None:
        """Note how far it is."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            write_json(self._note_path, asdict(self.note))
        except OSError as error:
            raise self._failed(error) from None
        self._committed_s = time.monotonic()

    def finish(self, form: Format) -> None:
        """Everything is answered: make the file."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            whole = form.assemble(self.path, self.note.rows)
            self.note = replace(self.note, out=_stamp(whole))
            # Before the rename: whoever is killed between the two makes the file again from the part.
            write_json(self._note_path, asdict(self.note))
            os.replace(whole, self.out)
            self.path.unlink(missing_ok=True)
        except OSError as error:
            raise self._failed(error) from None
        self.close()

    def close(self) -> None:
        """Let go of the file."""
        if not self.finished_before:
            with contextlib.suppress(OSError):
                self._file.close()

    def _failed(self, error: OSError) -> JobFailed:
        return JobFailed(
            f"{self.path} cannot be written ({error.strerror or error}); make room there and give the same command again."
        )


def _stamp(path: Path) -> str:
    status = path.stat()
    return f"{status.st_size} {status.st_mtime_ns}"
