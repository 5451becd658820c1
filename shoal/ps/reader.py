"""Reading a run's weights while it trains: a snapshot, then whatever changes, a few hundredths of a second later."""

from __future__ import annotations

import contextlib
import logging
import math
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import zmq

from shoal.errors import DeadlineError, JobFailed, RequestError, ShoalError
from shoal.ps import wire
from shoal.ps.banks import SeenBanks
from shoal.ps.keys import Pair, ReadKey
from shoal.ps.reader_copy import Copy

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

logger = logging.getLogger(__name__)

_DEADLINE_S = 10.0
# Three heartbeats without a word: the publisher is gone, or the network.
_SILENCE_S = 3.5


class Reader:
    """Keeps a copy of the weights of a run that trains under a parameter server.

    ::

        with shoal.ps.Reader("runs/clicks") as reader:
            reader.load_into(model)              # the newest weights, now
            reader.wait(reader.number + 1)       # until there are newer ones

    A copy never shows half an update of one server, rows of ``shoal.ps.Embedding`` included. ``versions`` says how many updates
    each server had made; with ``sync`` they are equal: it is a copy of one step's end. Rows may take here what they may in the
    run (``memory``); beyond that they go to disk. On the run's own machine the weights are read where the run publishes them.
    """

    def __init__(self, run: str | Path, deadline_s: float = _DEADLINE_S) -> None:
        """Subscribe, and wait for the first snapshot.

        Args:
            run: the directory of a run, or a key file from one (see ``docs/parameter_server.md``).
            deadline_s: how long to wait for it, or for the next of its rows: a large table takes as long as it takes.

        Raises:
            TargetError, RequestError: there is no key there, or it is none.
            DeadlineError: nobody answers: the run has ended, or the key is not the one that it has now.
        """
        self._key = ReadKey.read(Path(run))
        self._from = str(run)
        self._lock = threading.Condition()
        # What is shown, and what is not whole yet.
        self._copy = Copy(0, (), ())
        self._coming: Copy | None = None
        # The run's own memory, where this process may look into it.
        self._banks: SeenBanks | None = None
        # Into which modules which rows were written last: of which copy, and up to which publication.
        self._loaded: weakref.WeakKeyDictionary[nn.Module, tuple[Copy, int]] = weakref.WeakKeyDictionary()
        self._began_at = self._heard_at = time.monotonic()
        self._pieces = 0
        self._error: ShoalError | None = None
        self._ended: str | None = None
        self._closing = False
        self.lag_s = float("nan")
        """How old the newest publication was when it had arrived here, in seconds (on one machine, or with equal clocks)."""
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        try:
            # What cannot be spoken with at all comes to light here.
            _dial(self._context, self._key).close(0)
        except RequestError:
            self._context.term()
            raise
        self._thread = threading.Thread(target=self._follow, name="shoal-reader", daemon=True)
        self._thread.start()
        try:
            self._await_first(deadline_s)
        except BaseException:
            self.close()
            raise

    def _await_first(self, deadline_s: float) -> None:
        pieces = -1
        while True:
            try:
                self.wait(1, deadline_s)
                return
            except DeadlineError:
                if self._heard_at == self._began_at and self._ended is None:
                    raise DeadlineError(
                        f"Nobody has answered at {self._key.address} within {deadline_s:g} s; see whether the run of "
                        f"{self._from} is still there, and whether this is the read key that it has now."
                    ) from None
                if self._ended is not None or self._pieces in (0, pieces):
                    raise
                pieces = self._pieces

    def __enter__(self) -> Reader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Leave; the copy stays readable."""
        self._closing = True
        self._thread.join()
        self._context.term()

    # -- what is there -------------------------------------------------------------------------------------------

    @property
    def number(self) -> int:
        """Of the publication that this copy is of; it counts up."""
        return self._copy.number

    @property
    def versions(self) -> tuple[int, ...]:
        """How many updates each server had made."""
        return self._copy.versions

    @property
    def published_at(self) -> float:
        """When the run had what is here, in seconds of the Unix clock."""
        return self._copy.published_at

    @property
    def ended(self) -> str | None:
        """Why there will be nothing newer; None while there may be."""
        return self._ended

    @property
    def silent_s(self) -> float:
        """Seconds since the publisher was last heard."""
        return time.monotonic() - self._heard_at

    def wait(self, number: int, deadline_s: float = _DEADLINE_S) -> int:
        """Wait until publication ``number`` or a newer one is here; return the one that is.

        DeadlineError after ``deadline_s``, and where the run ends before.
        """
        with self._lock:
            self._lock.wait_for(lambda: self.number >= number or self._error or self._ended is not None, deadline_s)
            if self._error is not None:
                raise self._error
            if self.number < number:
                if self._ended is not None:
                    raise DeadlineError(
                        f"{self._from} publishes nothing newer than number {self.number}: {self._ended} Its model is in its "
                        "directory."
                    )
                raise DeadlineError(
                    f"Nothing newer than publication {self.number} came from {self._from} within {deadline_s:g} s, and no word "
                    f"for {self.silent_s:.1f} s; see whether the run is still there."
                )
            return self.number

    def state_dict(self) -> dict[str, torch.Tensor]:
        """A copy of the newest weights under the model's own names; tied names share a tensor.

        Tables are ``keys`` and ``rows``.
        """
        import torch

        from shoal.ps.embedding import prefix_of, state_of

        found: dict[str, torch.Tensor] = {}

        def copy() -> None:
            for tensor, data in self._copy.views():
                own = torch.from_numpy(data.copy()).view(getattr(torch, tensor.dtype)).view(tensor.shape)
                found.update(dict.fromkeys(tensor.names, own))

        with self._lock:
            self._whole(copy)
            for table in self._copy.tables:
                found.update(state_of(prefix_of(table.spec), table.export(), table.spec))
        return found

    def load_into(self, model: nn.Module) -> int:
        """Write the newest weights into a model's parameters and buffers, rows into its tables; return the publication's number.

        Of rows those are written that have changed since the last time. RequestError where the model has no place for one of
        them: it is not the run's.
        """
        import torch

        from shoal.ps.embedding import embeddings, table_name

        own = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
        modules = {table_name(path): module for path, module in embeddings(model)}

        def write() -> None:
            for tensor, data in self._copy.views():
                there = own.get(tensor.names[0])
                if there is None or tuple(there.shape) != tensor.shape:
                    raise RequestError(
                        f"The model has no {tensor.names[0]} of shape {tuple(tensor.shape)} as the run has; build it as "
                        "the job does."
                    )
                _write(there, data, getattr(torch, tensor.dtype))

        with self._lock, torch.no_grad():
            self._whole(write)
            for number, table in enumerate(self._copy.tables):
                module = modules.get(table.spec.name)
                if module is None or (module.spec.width, module.spec.dtype) != (table.spec.width, table.spec.dtype):
                    raise RequestError(
                        f"The model has no table {table.spec.name} with rows of {table.spec.width} × {table.spec.dtype} as the "
                        "run has; build it as the job does."
                    )
                copy, since = self._loaded.get(module, (None, 0))
                self._copy.write_rows(number, module, since if copy is self._copy and module.has_rows else None)
                self._loaded[module] = (self._copy, self._copy.number)
            return self._copy.number

    def _whole(self, take: Callable[[], None]) -> None:
        """Take the bytes of the copy that there is; again where the run has written newer ones there meanwhile. Holds the lock.

        DeadlineError where it is lost before it could be taken.
        """
        until = time.monotonic() + _DEADLINE_S
        while True:
            number = self.number
            take()
            if self._copy.there:
                return
            # The word of a newer one is on its way.
            self._lock.wait_for(lambda: self.number != number or self._error, max(0.0, until - time.monotonic()))  # noqa: B023
            if self._error is not None:
                raise self._error
            if time.monotonic() > until:
                raise DeadlineError(
                    f"{self._from} went on from publication {number} and was lost before it could be read; read its newest "
                    "checkpoint."
                )

    # -- the thread ----------------------------------------------------------------------------------------------

    def _follow(self) -> None:
        while not self._closing and self._ended is None and self._error is None:
            socket = _dial(self._context, self._key)
            monitor = socket.get_monitor_socket(zmq.EVENT_DISCONNECTED)
            try:
                self._converse(socket, monitor)
            except Exception as error:
                # Whoever waits is to know why nothing comes.
                logger.exception("Reading %s went wrong.", self._from)
                self._fail(JobFailed(f"Reading {self._from} went wrong ({type(error).__name__}: {error}); open it anew."))
            finally:
                if self._ended is None:
                    _send(socket, wire.Bye())
                socket.disable_monitor()
                monitor.close(0)
                socket.close()
        with self._lock:
            self._lock.notify_all()

    def _converse(self, socket: Any, monitor: Any) -> None:
        """Ask, take in, ask again; come back when nothing is heard any more, or the connection is lost.

        What was asked is lost with it; a run that changes its plan has another publisher at the same address a moment later.
        """
        _send(socket, wire.Hello())
        heard = time.monotonic()
        while not self._closing and time.monotonic() - heard < _SILENCE_S:
            if not socket.poll(100):
                if monitor.poll(0):
                    break
                continue
            frames = [frame.buffer for frame in socket.recv_multipart(copy=False)]
            heard = self._heard_at = time.monotonic()
            try:
                copy = self._coming or self._copy
                message, payload = wire.decode_answer(frames, copy.size or None, copy.described)
                answer = self._take(message, payload)
            except wire.Malformed as error:
                self._fail(
                    RequestError(f"What {self._from} publishes cannot be read ({error}); use the same version of shoal.")
                )
                return
            except ShoalError as error:
                # No disk for rows, no memory.
                self._fail(error)
                return
            if self._ended is not None:
                return
            _send(socket, answer)

    def _fail(self, error: ShoalError) -> None:
        with self._lock:
            self._error = error

    def _take(self, message: wire.FromPublisher, payload: memoryview) -> wire.FromReader:
        """Take in what the publisher said; what it is to be asked next."""
        if isinstance(message, wire.Piece):
            if self._coming is None:
                raise wire.Malformed("rows that nobody asked for")
            self._pieces += 1
            return self._coming.take_piece(message, payload, self._banks is not None)
        with self._lock:
            if isinstance(message, wire.Welcome):
                self._coming = None
                self._banks = SeenBanks.find(message.shared, message.size)
                if not self._copy.is_of(message):
                    self._copy = Copy(message.size, message.tensors, message.tables)
            elif isinstance(message, wire.Closed):
                self._ended = message.reason
            else:
                self._update(message, payload)
            self._lock.notify_all()
            coming = self._coming
        # What is only where the run has it, changes by way of a socket cannot be applied to.
        have = 0 if self._copy.shared and self._banks is None else self.number
        return wire.Next(have, self._banks is not None) if coming is None else coming.next_request(self._banks is not None)

    def _update(self, update: wire.Update, payload: memoryview) -> None:
        copy = self._coming or self._copy
        if not update.base and update.number and (self._coming is not None or update.number != copy.number):
            # All anew; what is shown stays until this is whole.
            copy = copy.empty()
            copy.take(update, payload, self._banks)
            self._coming = copy
        elif update.whole and update.base != copy.number and update.number != copy.number:
            raise wire.Malformed(f"changes to publication {update.base} where {copy.number} is here")
        elif update.whole and (update.number != copy.number or self._coming is not None):
            copy.take(update, payload, self._banks)
        if self._coming is not None and update.whole:
            self._copy, self._coming = self._coming, None
        if self._copy is copy and update.whole:
            self.lag_s = time.time() - update.taken_at
            loaded = [number for held, number in self._loaded.values() if held is copy]
            copy.trim(min(loaded, default=copy.number))


def answers(run: str | Path, within_s: float = _DEADLINE_S) -> bool:
    """Whether who publishes a run's weights can be heard now; it is asked what there is, and for no weights."""
    try:
        key = ReadKey.read(Path(run))
    except ShoalError:
        return False
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    try:
        socket = _dial(context, key)
    except RequestError:
        context.term()
        return False
    try:
        _send(socket, wire.Hello())
        heard = bool(socket.poll(math.ceil(within_s * 1000)))
        if heard:
            _send(socket, wire.Bye())
        return heard
    finally:
        socket.close()
        context.term()


def _dial(context: Any, key: ReadKey) -> Any:
    """A socket to the publisher of a key. RequestError where the key's address or keys are none."""
    socket = context.socket(zmq.DEALER)
    socket.linger = 100
    try:
        Pair(key.public, key.secret).speak_by(socket, key.publisher)
        socket.connect(key.address)
    except zmq.ZMQError:
        socket.close(0)
        raise RequestError(
            f"A read key with the address {key.address!r} has an address or keys that are none; take the one that the run wrote."
        ) from None
    return socket


def _write(place: torch.Tensor, data: np.ndarray, dtype: torch.dtype) -> None:
    import torch

    if place.dtype == dtype and place.device.type == "cpu" and place.is_contiguous():
        # On this thread alone: torch would wait for its others, which on a busy machine take a hundred times as long.
        place.detach().view(-1).view(torch.uint8).numpy()[:] = data
    else:
        place.copy_(torch.from_numpy(data).view(dtype).view(place.shape))


def _send(socket: Any, message: wire.FromReader) -> None:
    # A socket that was refused has nobody to send to, and would wait for ever.
    with contextlib.suppress(zmq.Again):
        socket.send(wire.encode(message), zmq.NOBLOCK)
