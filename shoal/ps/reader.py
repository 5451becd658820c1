"""Reading a run's weights while it trains: a snapshot, then whatever changes, a few hundredths of a second later."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import zmq

from shoal.errors import DeadlineError, RequestError
from shoal.ps import wire
from shoal.ps.keys import ReadKey

if TYPE_CHECKING:
    import torch
    from torch import nn

_DEADLINE_S = 10.0
# Three heartbeats without a word: the publisher is gone, or the network.
_SILENCE_S = 3.5


class Reader:
    """Keeps a copy of the weights of a run that trains under a parameter server.

    ::

        with shoal.ps.Reader("runs/clicks") as reader:
            reader.load_into(model)              # the newest weights, now
            reader.wait(reader.number + 1)       # until there are newer ones

    A copy never shows half an update of one server. ``versions`` says how many updates each server had made; with
    ``sync`` they are equal at every step's end, and otherwise a vector.
    """

    def __init__(self, run: str | Path, deadline_s: float = _DEADLINE_S) -> None:
        """Subscribe, and wait for the first snapshot.

        Args:
            run: the directory of a run, or a key file from one (see ``docs/parameter_server.md``).
            deadline_s: how long to wait for it.

        Raises:
            TargetError, RequestError: there is no key there, or it is none.
            DeadlineError: nobody answers: the run has ended, or the key is not the one that it has now.
        """
        self._key = ReadKey.read(Path(run))
        self._from = str(run)
        self._lock = threading.Condition()
        self._bytes = np.empty(0, np.uint8)
        self._tensors: tuple[wire.Tensor, ...] = ()
        self._heard_at = time.monotonic()
        self._error: RequestError | None = None
        self._ended: str | None = None
        self._closing = False
        self.number = 0
        """Of the publication that this copy is of; it counts up."""
        self.versions: tuple[int, ...] = ()
        self.lag_s = float("nan")
        """How old the newest publication was when it had arrived here, in seconds (on one machine, or with equal clocks)."""
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._thread = threading.Thread(target=self._follow, name="shoal-reader", daemon=True)
        self._thread.start()
        try:
            self.wait(1, deadline_s)
        except BaseException:
            self.close()
            raise

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
        """A copy of the newest weights under the model's own names; tied names share a tensor."""
        import torch

        found: dict[str, torch.Tensor] = {}
        with self._lock:
            for tensor, data in self._views():
                own = torch.from_numpy(data.copy()).view(getattr(torch, tensor.dtype)).view(tensor.shape)
                found.update(dict.fromkeys(tensor.names, own))
        return found

    def load_into(self, model: nn.Module) -> int:
        """Write the newest weights into a model's parameters and buffers; return the publication's number.

        RequestError where the model has not the same names and shapes.
        """
        import torch

        with torch.no_grad(), self._lock:
            own = {
                **dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False)),
            }  # fmt: skip
            for tensor, data in self._views():
                there = own.get(tensor.names[0])
                if there is None or tuple(there.shape) != tensor.shape:
                    raise RequestError(
                        f"The model has no {tensor.names[0]} of shape {tuple(tensor.shape)} as the run has; build it as "
                        "the job does."
                    )
                there.copy_(torch.from_numpy(data).view(getattr(torch, tensor.dtype)).view(there.shape))
            return self.number

    def _views(self) -> Iterator[tuple[wire.Tensor, np.ndarray]]:
        for tensor in self._tensors:
            size = wire.nbytes(tensor)
            yield tensor, self._bytes[tensor.offset : tensor.offset + size]

    # -- the thread ----------------------------------------------------------------------------------------------

    def _follow(self) -> None:
        while not self._closing and self._ended is None and self._error is None:
            socket = self._connect()
            try:
                self._converse(socket)
            finally:
                socket.close()
        with self._lock:
            self._lock.notify_all()

    def _connect(self) -> Any:
        socket = self._context.socket(zmq.DEALER)
        socket.linger = 100
        socket.curve_serverkey = self._key.publisher.encode()
        socket.curve_publickey, socket.curve_secretkey = self._key.public.encode(), self._key.secret.encode()
        socket.connect(self._key.address)
        return socket

    def _converse(self, socket: Any) -> None:
        """Ask, take in, ask again; come back when nothing is heard any more."""
        _send(socket, wire.Hello())
        heard = time.monotonic()
        while not self._closing and time.monotonic() - heard < _SILENCE_S:
            if not socket.poll(100):
                continue
            frames = [frame.buffer for frame in socket.recv_multipart(copy=False)]
            heard = self._heard_at = time.monotonic()
            try:
                message, payload = wire.decode_answer(frames, len(self._bytes) or None)
                self._take(message, payload)
            except wire.Malformed as error:
                with self._lock:
                    self._error = RequestError(
                        f"What {self._from} publishes cannot be read ({error}); use the same version of shoal."
                    )
                return
            if self._ended is not None:
                return
            _send(socket, wire.Next(self.number))
        _send(socket, wire.Bye())

    def _take(self, message: wire.FromPublisher, payload: memoryview) -> None:
        with self._lock:
            if isinstance(message, wire.Welcome):
                if any(t.offset + wire.nbytes(t) > message.size for t in message.tensors):
                    raise wire.Malformed("a tensor lies outside of what is published")
                if (message.size, message.tensors) != (len(self._bytes), self._tensors):
                    self._bytes, self._tensors, self.number = np.zeros(message.size, np.uint8), message.tensors, 0
            elif isinstance(message, wire.Closed):
                self._ended = message.reason
            elif message.number != self.number:
                if message.base not in (0, self.number):
                    raise wire.Malformed(f"changes to publication {message.base} where {self.number} is here")
                at = 0
                for first, count in message.runs:
                    place = self._bytes[first * wire.BLOCK_BYTES : (first + count) * wire.BLOCK_BYTES]
                    place[:] = np.frombuffer(payload[at : at + len(place)], np.uint8)
                    at += len(place)
                self.number, self.versions = message.number, message.versions
                self.lag_s = time.time() - message.taken_at
            self._lock.notify_all()


def _send(socket: Any, message: wire.FromReader) -> None:
    # A socket that was refused has nobody to send to, and would wait for ever.
    with contextlib.suppress(zmq.Again):
        socket.send(wire.encode(message), zmq.NOBLOCK)
