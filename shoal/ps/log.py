"""The write-ahead log of a parameter server: what pushes have made of its parameters, on disk before they are acknowledged.

A log is a row of *segments*, files ``NAME-<number>-<mark>.log`` that are only ever appended to. They hold *frames*, each a
header and a payload with a checksum (CRC-32) of its own: the bytes of a tensor after a push, gradients of rows, and at the end
of a push a COMMIT. A push without a whole COMMIT is not in the log, so what was torn by a crash is recognised and cut off.

What a log holds of a dense tensor are after-images, with the place that they have in a checkpoint's file. So any number of
servers, under any plan, can take them up, whatever the optimizer was; and of each place only the newest one has to be read
back, so that a recovery is bounded by the size of the parameters, not by the number of pushes. Of rows it holds the gradients,
summed by key: they are few, and applying them again gives the same rows.

Every push has a number, one more than the last one's, and a *mark*: a checkpoint of a step above it holds the push. Segments
all of whose pushes have such marks are deleted (``prune``).

*Group commit* (DeWitt et al. 1984): a thread syncs whatever has been appended, all at once, while the server goes on with the
next pushes; what has gathered meanwhile is covered by its next sync.
"""

from __future__ import annotations

import collections
import contextlib
import errno
import itertools
import mmap
import os
import re
import struct
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

from shoal.cluster.local import find_cores
from shoal.tensorfile import sync

_HEADER = struct.Struct("<IHHQQQQI")
_HEADER_BYTES = _HEADER.size + 4
_MAGIC = 0x474F4C53
_MOST_BUFFERS = 512
_READERS = 4
# Payloads begin at multiples of this, so that the numbers in them can be used where they lie.
_ALIGN = 16
# So many pushes are looked at before they are asked for.
_LOOKED_AHEAD = 16
SEGMENT_BYTES = 64 << 20


class Kind(IntEnum):
    """What a frame holds, and what its ``where`` says."""

    BYTES = 1
    """Bytes of tensors; their offset in a checkpoint's file."""
    LINES = 2
    """Some lines of a tensor; the tensor's offset: see ``shoal.train.push_log``."""
    ROWS = 3
    """Gradients of rows, summed by key; the number of their table."""
    COMMIT = 4
    """The end of a push."""
    TOLD = 5
    """A frame of a message: see ``shoal.ps.logged``; which one."""


@dataclass(frozen=True)
class Frame:
    """A frame in a segment; ``at`` and ``length`` are its payload's bytes."""

    kind: Kind
    where: int
    at: int
    length: int
    checksum: int
    segment: Segment

    @property
    def data(self) -> memoryview:
        """Its payload as it lies there, for whoever knows that it ``is_whole``."""
        return self.segment.bytes[self.at : self.at + self.length]

    def is_whole(self) -> bool:
        """Whether its payload is what was written."""
        return zlib.crc32(self.data) == self.checksum

    def read(self) -> memoryview:
        """Its payload. TornError where that is not what was written."""
        if not self.is_whole():
            raise TornError(f"{self.segment.path}: the frame at {self.at} is not what was written")
        return self.data


@dataclass(frozen=True)
class Push:
    """A push in the log; ``notes`` is what its COMMIT holds, ``start`` and ``end`` where it lies in ``segment``."""

    number: int
    mark: int
    frames: tuple[Frame, ...]
    notes: bytes
    start: int
    end: int
    segment: Segment


class TornError(Exception):
    """A frame was not written to its end."""


@dataclass(frozen=True)
class SegmentName:
    """What a segment's name says: whose it is, which one, and the mark of its first push."""

    path: Path
    number: int
    mark: int


def segments(directory: Path, name: str) -> list[SegmentName]:
    """The segments of one log, in order."""
    pattern = re.compile(re.escape(name) + r"-(\d{8})-(\d{12})\.log")
    with contextlib.suppress(FileNotFoundError):
        found = [(path, pattern.fullmatch(path.name)) for path in directory.iterdir()]
        return sorted(
            (SegmentName(path, int(match[1]), int(match[2])) for path, match in found if match), key=lambda s: s.number
        )
    return []


def prune(directory: Path, name: str, mark: int) -> int:
    """Delete the segments whose pushes all have a mark below ``mark``; return how many bytes that were."""
    own, freed = segments(directory, name), 0
    for segment, following in zip(own, own[1:], strict=False):
        # A segment's marks are at most the next one's first; that a segment has several is only where they rise with every push.
        if segment.mark >= mark or following.mark > mark:
            break
        with contextlib.suppress(OSError):
            freed += segment.path.stat().st_size
            segment.path.unlink()
    return freed


def cut(directory: Path, name: str, mark: int, last: Push | None) -> None:
    """Cut off what a log holds behind the push ``last``, as ``read`` has found it, or behind all with a mark below ``mark``."""
    own = segments(directory, name)
    if last is not None:
        own = [segment for segment in own if segment.path.name >= last.segment.path.name]
    for at, segment in enumerate(own):
        opened, end = Segment(segment.path), 0
        if last is not None:
            end = last.end if at == 0 else 0
        else:
            for push in itertools.takewhile(lambda push: push.mark < mark, opened.pushes()):
                end = push.end
        if end < len(opened.bytes):
            os.truncate(segment.path, end)
            for later in own[at + 1 :]:
                later.path.unlink()
            return


def total_bytes(directory: Path) -> int:
    """What all logs in a directory take on disk."""
    size = 0
    with contextlib.suppress(OSError):
        for entry in os.scandir(directory):
            with contextlib.suppress(OSError):
                size += entry.stat().st_size if entry.name.endswith(".log") else 0
    return size


# -- reading ---------------------------------------------------------------------------------------------------------


class Segment:
    """A segment, mapped."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            # Nobody writes to it, but torch takes no memory that cannot be written to.
            self._map = mmap.mmap(file.fileno(), size, access=mmap.ACCESS_COPY) if size else None
        self.bytes: memoryview = memoryview(self._map) if self._map is not None else memoryview(b"")

    def pushes(self) -> Iterator[Push]:
        """The pushes that it holds whole, up to the first that is torn."""
        at, begun, frames = 0, 0, list[Frame]()
        number: int | None = None
        while at + _HEADER_BYTES <= len(self.bytes):
            head = self.bytes[at : at + _HEADER.size]
            (check,) = struct.unpack_from("<I", self.bytes, at + _HEADER.size)
            magic, kind, filled, push, mark, where, length, checksum = _HEADER.unpack(head)
            start = at + _HEADER_BYTES
            if magic != _MAGIC or zlib.crc32(head) != check or start + length + filled > len(self.bytes):
                return
            if push != number:
                # What a killed writer had begun; its successor has begun anew.
                frames, number, begun = [], push, at
            frame = Frame(Kind(kind), where, start, length, checksum, self)
            at = start + length + filled
            if frame.kind is not Kind.COMMIT:
                frames.append(frame)
                continue
            try:
                notes = bytes(frame.read())
            except TornError:
                return
            yield Push(push, mark, tuple(frames), notes, begun, at, self)
            frames, number = [], None


def read(directory: Path, name: str, mark: int = 0) -> list[Push]:
    """The pushes of a log with a mark of at least ``mark``, up to the first that is torn or missing."""
    found: list[Push] = []
    for segment in segments(directory, name):
        opened, end = Segment(segment.path), 0
        for push in opened.pushes():
            end = push.end
            if push.mark < mark:
                continue
            if found and push.number != found[-1].number + 1:
                return found
            found.append(push)
        if end < len(opened.bytes):
            return found
    return found


def newest(frames: Iterable[Frame]) -> list[Frame]:
    """Of frames for the same place only the last one, in the order in which they are to be applied."""
    kept: dict[tuple[int, int, int], Frame] = {}
    for number, frame in enumerate(frames):
        key = (frame.kind, frame.where, frame.length if frame.kind is Kind.BYTES else -1 - number)
        kept.pop(key, None)
        kept[key] = frame
    return list(kept.values())


def first_torn(frames: Sequence[Frame]) -> Frame | None:
    """The first of these frames that is not what was written. All are read, by as many threads as there are cores."""
    with _readers() as threads:
        found = threads.map(Frame.is_whole, frames)
        return next((frame for frame, well in zip(frames, found, strict=True) if not well), None)


def whole(pushes: Sequence[Push]) -> Iterator[Push]:
    """These pushes, each as soon as all of its frames were seen to be what was written. TornError where they are not.

    Other threads look at what comes next, and begin at once, so that whoever is given a push need not wait for them.
    """
    threads, coming = _readers(), iter(pushes)

    def look(push: Push) -> Future[Frame | None]:
        return threads.submit(lambda: next((frame for frame in push.frames if not frame.is_whole()), None))

    looked = collections.deque((push, look(push)) for push in itertools.islice(coming, _LOOKED_AHEAD))

    def each() -> Iterator[Push]:
        with threads:
            while looked:
                push, found = looked.popleft()
                if (torn := found.result()) is not None:
                    raise TornError(f"{torn.segment.path}: the frame at {torn.at} is not what was written")
                looked.extend((later, look(later)) for later in itertools.islice(coming, 1))
                yield push

    return each()


def _readers() -> ThreadPoolExecutor:
    return ThreadPoolExecutor(min(_READERS, find_cores()), "shoal-log-read")


# -- writing ---------------------------------------------------------------------------------------------------------


class LogWriter:
    """Appends pushes to a log; one writer at a time.

    Args:
        directory: where the segments are; made where it is not there.
        name: the log's.
        on_durable: called by the thread that syncs, with the number of the last push that is on disk now.
        limit_bytes: what all logs in the directory may take together; None for all that the disk has.

    A push is ``begin``, ``add`` and ``commit``. All of these raise OSError where the disk takes no more: what was begun is cut
    off again then, and everything before it stays.
    """

    def __init__(
        self, directory: Path, name: str, on_durable: Callable[[int], None] = lambda number: None,
        limit_bytes: int | None = None, segment_bytes: int = SEGMENT_BYTES,
    ) -> None:  # fmt: skip
        self._directory, self._name = directory, name
        self._on_durable, self._limit, self._segment_bytes = on_durable, limit_bytes, segment_bytes
        directory.mkdir(parents=True, exist_ok=True)
        self._fd = -1
        self._segment = 0
        self._end = self._begun = 0
        self._number = self._mark = 0
        self._others = 0
        self.last: int | None = None
        """The number of the last push in the log."""
        self._changed = threading.Condition()
        self._unsynced: list[int] = []
        self._made_files = False
        self._appended = self._synced = -1
        self._closing = False
        self.failure: OSError | None = None
        self._take_up()
        self._thread = threading.Thread(target=self._sync_loop, name="shoal-log", daemon=True)
        self._thread.start()

    def _take_up(self) -> None:
        """Go on behind the last whole push; what a predecessor had begun is cut off."""
        own = segments(self._directory, self._name)
        for segment in reversed(own):
            opened, end = Segment(segment.path), 0
            for push in opened.pushes():
                self.last, end = push.number, push.end
            self._fd = os.open(segment.path, os.O_WRONLY | os.O_CLOEXEC)
            os.ftruncate(self._fd, end)
            self._segment, self._end = segment.number, end
            if end:
                break
            os.close(self._fd)
            self._fd = -1
            segment.path.unlink()
        self._segment = max([self._segment, *(s.number for s in own)])
        if self._fd >= 0 and self.last is not None:
            # Its writer may have died before it was synced.
            self._unsynced, self._appended, self._synced = [os.dup(self._fd)], self.last, self.last - 1

    def begin(self, number: int, mark: int, cut: bool = False) -> None:
        """Begin a push; ``cut``: in a new segment, because a checkpoint was made."""
        if self._fd < 0 or cut or self._end >= self._segment_bytes:
            self._next_segment(mark)
        self._number, self._mark, self._begun = number, mark, self._end

    def add(self, kind: Kind, pieces: Iterable[tuple[int, Sequence[Any]]]) -> None:
        """Append frames of one kind: where, and the buffers that are its payload."""
        buffers: list[Any] = []
        at = self._end
        for where, parts in pieces:
            length = checksum = 0
            for part in parts:
                length += memoryview(part).nbytes
                checksum = zlib.crc32(part, checksum)
            filled = -(at + length) % _ALIGN
            at += _HEADER_BYTES + length + filled
            head = _HEADER.pack(_MAGIC, kind, filled, self._number, self._mark, where, length, checksum)
            buffers += (head + struct.pack("<I", zlib.crc32(head)), *parts, bytes(filled))
            if len(buffers) >= _MOST_BUFFERS:
                self._write(buffers)
                buffers = []
        self._write(buffers)

    def commit(self, notes: bytes) -> None:
        """The push is whole; it is on disk when ``on_durable`` says so."""
        self.add(Kind.COMMIT, [(0, (notes,))])
        self.last = self._number
        with self._changed:
            self._appended = self._number
            if not self._unsynced:
                self._unsynced.append(os.dup(self._fd))
            self._changed.notify()

    def abort(self) -> None:
        """Cut off the push that was begun."""
        if self._fd >= 0:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self._begun)
            self._end = self._begun

    def wait(self, number: int, timeout_s: float) -> bool:
        """Wait until a push is on disk; OSError where it cannot get there."""
        with self._changed:
            done = self._changed.wait_for(lambda: self._synced >= number or self.failure is not None, timeout_s)
            if self.failure is not None:
                raise self.failure
            return done

    def close(self) -> None:
        """Sync what is left, and give everything back."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def _next_segment(self, mark: int) -> None:
        self._segment += 1
        path = self._directory / f"{self._name}-{self._segment:08d}-{mark:012d}.log"
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        with self._changed:
            if self._fd >= 0:
                os.close(self._fd)
            self._fd, self._end, self._begun = fd, 0, 0
            # The one before stays open until it is synced.
            self._unsynced.append(os.dup(fd))
            self._made_files = True
        self._others = total_bytes(self._directory)

    def _write(self, buffers: list[Any]) -> None:
        if not buffers:
            return
        if self.failure is not None:
            raise self.failure
        views = [view.cast("B") for buffer in buffers if (view := memoryview(buffer)).nbytes]
        size = sum(map(len, views))
        try:
            if self._limit is not None and self._others + self._end + size > self._limit:
                raise OSError(errno.ENOSPC, f"{self._limit} bytes are the log's limit")
            while views:
                written = os.pwritev(self._fd, views, self._end)
                self._end += written
                while views and written >= len(views[0]):
                    written -= len(views.pop(0))
                if views and written:
                    views[0] = views[0][written:]
        except OSError:
            self.abort()
            raise

    def _sync_loop(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._appended > self._synced or self._closing)
                if self._appended <= self._synced or self.failure is not None:
                    self._give_back(self._unsynced)
                    return
                target, files, made = self._appended, self._unsynced, self._made_files
                self._unsynced, self._made_files = [], False
            try:
                for fd in files:
                    os.fdatasync(fd)
                if made:
                    sync(self._directory)
            except OSError as error:
                # After a failed sync nobody knows what is on disk: nothing more may be acknowledged.
                with self._changed:
                    self.failure = error
                    self._changed.notify_all()
                continue
            finally:
                self._give_back(files)
            with self._changed:
                self._synced = target
                self._changed.notify_all()
            self._on_durable(target)

    @staticmethod
    def _give_back(files: list[int]) -> None:
        for fd in files:
            os.close(fd)
        files.clear()
