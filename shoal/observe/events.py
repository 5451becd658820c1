"""The events of a run: what is written to events.jsonl, and how it is read back.

One JSON object a line: ``t`` (seconds since 1970), ``kind``, then the fields of that kind. docs/events.md says what
each field means; a test holds that page and ``KINDS`` together.
"""

from __future__ import annotations

import json
import math
import os
import re
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any

from shoal.errors import RunDirectoryError

KINDS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "run_start": (
            "run", "job", "plan", "world_size", "steps_total", "epochs_total", "samples", "batch_size",
            "steps_per_epoch", "resumed_from", "versions",
        ),
        "plan": ("plan", "why", "batch", "predicted_step_s"),
        "step": ("step", "epoch", "loss", "loss_mean", "metrics", "samples", "step_s", "workers"),
        "epoch": ("epoch", "loss", "eval_loss", "samples_per_s", "partial", "step", "train_s", "eval_s"),
        "checkpoint": ("step", "path", "bytes", "write_s"),
        "checkpoint_failed": ("step", "reason"),
        "checkpoint_damaged": ("path", "reason"),
        "death": ("rank", "pid", "step", "phase", "cause", "role"),
        "recovered": ("rank", "pid", "step", "after_s", "action", "role", "parts_s"),
        "stall": ("rank", "pid", "step", "phase", "waited_s", "waits_for", "stack", "replaced_after_s", "role"),
        "clock": ("rank", "clock", "slowest"),
        "push_ack": ("rank", "epoch", "batch", "shard", "versions", "staleness"),
        "portion_rerun": ("rank", "epoch", "batch", "shard", "times"),
        "push_dropped": ("rank", "epoch", "batch", "shard"),
        "push_log_failed": ("server", "reason"),
        "push_rejected": ("rank", "epoch", "batch", "shard", "parameter", "samples"),
        "replan": (
            "step", "before", "plan", "world_size", "pause_s", "by", "why", "keys_moved", "keys", "rows_moved", "bytes_moved",
        ),
        "warning": ("text",),
        "stop": ("step", "reason"),
        "error": ("sentence", "rank", "traceback"),
        "run_end": (
            "status", "steps", "epochs", "samples_per_s", "step_s", "predicted_step_s", "memory_mb",
            "predicted_memory_mb", "startup_s", "eval_s", "wall_s", "model", "weights_sha256",
        ),
    }
)  # fmt: skip
"""Kind -> its fields. ``epoch`` may carry more: one field a metric, under the metric's own name."""

OPEN_KINDS = frozenset({"epoch"})
"""Kinds whose fields are partly named by the job."""

FREQUENT_KINDS = frozenset({"step", "clock", "push_ack", "push_dropped", "portion_rerun"})
"""Kinds that wait for ``flush``; all others are handed to the file at once."""

_FLUSH_BYTES = 1 << 16
_FULL_DISK_BYTES = 16 << 20
_KIND_AT_START = re.compile(rb'\{"t": [-+.0-9e]+, "kind": "(\w+)"')


def to_json(value: Any) -> str:
    """Return ``value`` as one line of strict JSON.

    NaN and the infinities become null, which every JSON reader understands; NumPy scalars become numbers, paths text,
    and sets, tuples and mappings the nearest thing that JSON has.
    """
    try:
        return json.dumps(value, allow_nan=False, default=_plain)
    except ValueError:
        return json.dumps(_finite(value), allow_nan=False, default=_plain)


def _plain(value: Any) -> Any:
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if hasattr(value, "tolist"):  # a NumPy or torch scalar or array
        return _finite(value.tolist())
    raise TypeError(f"an event cannot hold a {type(value).__name__}")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


class EventLog:
    """Appends events to a file; owned and written by one process.

    Steps are buffered until ``flush``, which the owner calls about twice a second; every other kind is written at once.
    A disk that is full does not end a run: what could not be written is kept (up to 16 MB of it) and tried again with
    the next flush, and ``dropped`` counts the events that found no room even there.
    """

    def __init__(self, path: str | os.PathLike[str], clock: Callable[[], float] = time.time) -> None:
        """Open ``path`` for appending; half a line that a killed writer left at its end is removed.

        Raises:
            RunDirectoryError: the file cannot be written.
        """
        self.path = Path(path)
        self.dropped = 0
        self._clock = clock
        self._pending = bytearray()
        try:
            self._fd = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise RunDirectoryError(
                f"{self.path} cannot be written ({error.strerror}); choose another run directory with --run."
            ) from None
        self._remove_torn_line()

    def write(self, kind: str, **fields: Any) -> dict[str, Any]:
        """Append one event and return it as ``{"t", "kind", **fields}``, with its values as they were given."""
        assert kind in KINDS, f"no event is called {kind!r}"
        unknown = [name for name in fields if name not in KINDS[kind]]
        assert not unknown or kind in OPEN_KINDS, f"a {kind} event has no field {unknown}"
        event = {"t": self._clock(), "kind": kind, **fields}
        if kind in FREQUENT_KINDS and len(self._pending) > _FULL_DISK_BYTES:
            self.dropped += 1
            return event
        self._pending += to_json(event).encode() + b"\n"
        if kind not in FREQUENT_KINDS or len(self._pending) > _FLUSH_BYTES:
            self.flush()
        return event

    def flush(self) -> None:
        """Hand everything to the file; what a full disk refuses stays for the next time."""
        while self._pending:
            try:
                written = os.write(self._fd, self._pending)
            except OSError:
                return
            del self._pending[:written]

    def close(self) -> None:
        """Flush and close; a second call does nothing."""
        if self._fd >= 0:
            self.flush()
            os.close(self._fd)
            self._fd = -1

    def _remove_torn_line(self) -> None:
        size = os.fstat(self._fd).st_size
        tail = b""
        while len(tail) < size and b"\n" not in tail:
            length = min(_FLUSH_BYTES, size - len(tail))
            tail = os.pread(self._fd, length, size - len(tail) - length) + tail
        torn = len(tail) - (tail.rfind(b"\n") + 1)
        if torn:
            os.ftruncate(self._fd, size - torn)

    def __enter__(self) -> EventLog:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_events(path: str | os.PathLike[str], kinds: Collection[str] | None = None) -> Iterator[dict[str, Any]]:
    """Yield the events of a file in order, all of them or those of some kinds.

    A last line without its end is left out: its writer was killed, or is writing it now.

    Raises:
        RunDirectoryError: the file cannot be read, or a line before the last is damaged.
    """
    try:
        file = open(path, "rb")  # noqa: SIM115 (closed below; the generator may be left half way)
    except OSError as error:
        raise RunDirectoryError(f"{os.fspath(path)} cannot be read: {error.strerror}.") from None
    with file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                return
            if kinds is not None:
                # Most lines are steps: tell them from the others without parsing them.
                start = _KIND_AT_START.match(line)
                if start and start.group(1).decode() not in kinds:
                    continue
            try:
                event = json.loads(line)
                kind = event["kind"]
            except (ValueError, KeyError, TypeError):
                raise RunDirectoryError(
                    f"{os.fspath(path)}, line {number}, is no event; restore the file or remove that line."
                ) from None
            if kinds is None or kind in kinds:
                yield event
