"""A server that shares no memory and keeps a log: what it is told is on disk before it is acknowledged.

A shard is a state machine, so its log holds what it was told: each push as it came, whether it was applied or waits for others,
and each word that these are to be applied. Told the same again, in order, behind the state that it began with, another process
has the same state, to the bit. Acknowledgements wait for the thread that syncs; what has gathered meanwhile its next sync
covers (group commit, see ``shoal.ps.log``).
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from shoal.errors import JobFailed, RequestError, ShoalError
from shoal.ps import log as logs
from shoal.ps import messages
from shoal.ps.applied import PartlyApplied, PushId
from shoal.ps.checks import check_count
from shoal.ps.dense import Piece
from shoal.ps.endpoint import Endpoint
from shoal.ps.log import Kind, LogWriter, TornError
from shoal.ps.messages import Commit, Done, PushHead, Recovered, Refused, Request
from shoal.ps.requests import Damaged
from shoal.ps.shard import Kept, Push, Shard
from shoal.ps.shard_server import ShardServer, forms_of
from shoal.ps.staged import MissingError, Staged
from shoal.ps.wire import Malformed, decode_head, encode

Told = tuple[PushHead | Commit, Sequence[memoryview]]
"""What a server was told, and the frames that came with it."""


class Recover(msgspec.Struct, tag="recover", frozen=True):
    """Do again what the log has behind a checkpoint, and go on with it behind that of step ``mark``.

    ``checkpoint``: where in the run's directory the one is that is to be taken up first, of step ``since``, with what of a
    server's state is no tensor (but ``numbers``, which it has itself); empty: this server has what that of step ``mark`` holds.
    ``session``: the folder in which the log is, beside the one that it was in; empty: it is where it was.
    """

    number: int
    mark: int
    checkpoint: str = ""
    since: int = 0
    kept: Kept | None = None
    session: str = ""


class Mark(msgspec.Struct, tag="mark", frozen=True):
    """There is a checkpoint of step ``mark``, which holds everything that this server was told."""

    number: int
    mark: int


_decoder = msgspec.msgpack.Decoder(Recover | Mark)


class LogFullError(ShoalError):
    """The log takes no more."""


def read_told(directory: Path, name: str, mark: int) -> Iterator[Told]:
    """What a server was told behind the checkpoint of step ``mark``, in order, each as soon as it was seen to be whole.

    Other threads begin to look at once. JobFailed, when it comes to that, where a file is damaged. Frames are used where they
    lie in the file.
    """
    return _decoded(directory, name, logs.whole(logs.read(directory, name, mark)))


def _decoded(directory: Path, name: str, records: Iterator[logs.Push]) -> Iterator[Told]:
    try:
        for record in records:
            message = messages.decode_request([record.notes])
            if not isinstance(message, (PushHead, Commit)):
                raise Malformed(f"{type(message).__name__} is nothing that is kept")
            yield message, [frame.data for frame in record.frames]
    except (TornError, Malformed) as error:
        raise JobFailed(
            f"The log {name} in {directory} is damaged ({error}); move {directory} away to go on from the last checkpoint alone."
        ) from None


def do_again(shard: Shard, staged: Staged, told: Iterable[Told], counts: Callable[[Sequence[PushId]], bool]) -> None:
    """Do what a server was told; ``counts``: of the ids of a push, whether it is to be done.

    JobFailed where that is none of this shard: only what had been found right was written.
    """
    forms = forms_of(shard)
    for message, frames in told:
        if not counts(message.ids):
            continue
        try:
            if isinstance(message, Commit):
                staged.commit(message.ids, message.settled, message.scale, message.groups)
                continue
            push = messages.unpack_push(message, frames, forms)
            if message.staged:
                staged.stage(push)
            else:
                shard.apply(push)
        except (Malformed, RequestError, MissingError, PartlyApplied) as error:
            raise JobFailed(f"The log of pushes does not fit the run ({error}); move it away to go on without it.") from None


class ToldLog:
    """Writes a server's log; implements ``Keeper``. The server's thread uses it."""

    def __init__(self, directory: Path, name: str, endpoint: Endpoint, limit_bytes: int | None) -> None:
        self.directory, self.name, self._limit = directory, name, limit_bytes
        self.mark = 0
        self._cut = False
        self._waiting: deque[tuple[int, Callable[[], None]]] = deque()
        # The thread that syncs wakes the server's by this.
        self._woken, self._wakes = os.pipe()
        for end in (self._woken, self._wakes):
            os.set_blocking(end, False)
        self._endpoint = endpoint
        endpoint.attend(self._woken, self._release)
        self._open()

    def _open(self) -> None:
        self._durable = -1
        self._writer = LogWriter(self.directory, self.name, self._on_durable, self._limit)
        self._last = -1 if self._writer.last is None else self._writer.last
        # Whoever sees this sees the log, too.
        (self.directory / f"{self.name}.here").touch()

    def go_on_in(self, session: str) -> None:
        """Go on in the folder of another session. RequestError where that is no name of one, LogFullError where it cannot."""
        if not (session.isascii() and session.isdigit() and len(session) < 10):
            raise RequestError(f"{session!r} is no session of a log.")
        if session == self.directory.name:
            return
        try:
            self._writer.close()
            if self._writer.failure is not None:
                raise self._writer.failure
            # All that was told is on disk now.
            self._release()
            self.directory = self.directory.with_name(session)
            self._open()
        except OSError as error:
            raise LogFullError(error.strerror or str(error)) from None

    def append(self, head: bytes, frames: Sequence[Any]) -> None:
        """Write what the server was told and is about to do. LogFullError: it is not in the log, and not to be done."""
        try:
            self._writer.begin(self._last + 1, self.mark, self._cut)
            self._cut = False
            self._writer.add(Kind.TOLD, [(at, (frame,)) for at, frame in enumerate(frames)])
            self._writer.commit(head)
        except OSError as error:
            self._writer.abort()
            raise LogFullError(error.strerror or str(error)) from None
        self._last += 1

    def begin_at(self, mark: int) -> None:
        """What is written from here on stands behind a checkpoint."""
        self._cut = self._cut or mark > self.mark
        self.mark = mark

    def when_kept(self, version: int, then: Callable[[], None]) -> None:
        """All that was told so far has to be on disk: what is acknowledged may stand on any of it."""
        if self._durable >= self._last:
            then()
        else:
            self._waiting.append((self._last, then))

    def _on_durable(self, number: int) -> None:
        self._durable = number
        with contextlib.suppress(BlockingIOError):
            os.write(self._wakes, b"\0")

    def _release(self) -> None:
        with contextlib.suppress(BlockingIOError):
            os.read(self._woken, 1 << 16)
        while self._waiting and self._waiting[0][0] <= self._durable:
            self._waiting.popleft()[1]()

    @property
    def failure(self) -> OSError | None:
        """Why what was written did not get to the disk."""
        return self._writer.failure

    def close(self) -> None:
        """See to it that everything is on disk."""
        self._writer.close()
        self._endpoint.forget(self._woken)
        for end in (self._woken, self._wakes):
            os.close(end)


TakeUp = Callable[[str, Kept], None]
"""Lets a server's shard hold what a checkpoint has, which is named as it lies in the run's directory.

Damaged: it is not what was written; then rows are as they were, and weights may be anything. RequestError: it is of another run.
"""


class LoggedServer(ShardServer):
    """A server with a log. ``trouble``: why it takes no pushes any more."""

    def __init__(
        self, shard: Shard, endpoint: Endpoint, log: ToldLog, take_up: TakeUp | None = None,
        pieces: Mapping[int, Piece] | None = None,
    ) -> None:  # fmt: skip
        super().__init__(shard, endpoint, log, pieces)
        self._log, self._take_up = log, take_up
        self._recovered: Recover | None = None
        self.trouble: str | None = None
        # What is being answered.
        self._told: Told | None = None
        shard.on_apply = self._append

    def serve(self, over: Callable[[], bool], between: Callable[[], None] = lambda: None) -> None:
        try:
            super().serve(over, between)
        finally:
            self._log.close()

    def _answer(self, message: Request, frames: Sequence[Any], answer: Callable[..., None]) -> None:
        if not isinstance(message, (PushHead, Commit)):
            super()._answer(message, frames, answer)
            return
        if self._log.failure is not None:
            self.trouble = self.trouble or self._log.failure.strerror or str(self._log.failure)
        self._told = message, frames
        try:
            if self.trouble is None:
                super()._answer(message, frames, answer)
        except LogFullError as error:
            self.trouble = str(error)
        finally:
            self._told = None
        # Of a push nobody is told anything more but the lead, who ends the run; and it may be the lead who waits.
        if self.trouble is not None and isinstance(message, Commit):
            raise LogFullError(self.trouble)

    def _stage(self, push: Push) -> bool:
        new = super()._stage(push)
        if new:
            try:
                self._append(push)
            except LogFullError:
                self.staged.take_back(push)
                raise
        return new

    def _append(self, push: Push) -> None:
        # What is done again is in the log.
        if self._told is not None:
            message, frames = self._told
            if isinstance(message, PushHead):
                # Where other pushes are left out when it is done again, versions are others, and it counts as it did.
                message = msgspec.structs.replace(message, pulled=None, staleness=push.staleness)
            self._log.append(encode(message), frames)

    def _take_other(self, identity: bytes, frames: Sequence[Any], error: Malformed) -> None:
        try:
            message = decode_head(_decoder, frames)
        except Malformed:
            super()._take_other(identity, frames, error)
            return
        number = message.number
        answer: Done | Recovered | Refused = Done(number, self.shard.version)
        try:
            check_count("step of a checkpoint", message.mark)
            if isinstance(message, Recover):
                seconds = self._recover(message)
                answer = Recovered(number, self.shard.version, seconds)
            self._log.begin_at(message.mark)
        except Damaged as damaged:
            answer = Refused(number, str(damaged), damaged=True)
        except (PartlyApplied, MissingError, ShoalError) as refused:
            answer = Refused(number, str(refused))
        self.endpoint.send(identity, encode(answer))

    def _recover(self, asked: Recover) -> dict[str, float]:
        """Go on from a checkpoint and the log; the seconds that its parts took."""
        if asked == self._recovered:
            # It was sent twice, and others have spoken to this server since.
            return {}
        check_count("step of a checkpoint", asked.since)
        log, began, cpu_began = self._log, time.monotonic(), time.process_time()
        if asked.session:
            log.go_on_in(asked.session)
        told = read_told(log.directory, log.name, asked.since if asked.checkpoint else asked.mark)
        if asked.checkpoint:
            if asked.kept is None or self._take_up is None:
                raise RequestError("A server is to take up a checkpoint that it cannot read.")
            self._take_up(asked.checkpoint, asked.kept)
            self.staged.put(())
        taken_up = time.monotonic()
        do_again(self.shard, self.staged, told, lambda ids: True)
        self._recovered = asked
        done, cpu_s = time.monotonic(), time.process_time() - cpu_began
        return {"checkpoint_s": taken_up - began, "log_s": done - taken_up, "cpu_s": cpu_s}
