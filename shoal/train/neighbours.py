"""Worker processes on this machine that share no memory with the one that starts them."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import cloudpickle

from shoal.errors import WorkerLostError
from shoal.job import Job
from shoal.process.channel import dumps
from shoal.process.failure import Failure
from shoal.process.late_dynamo import LateDynamo
from shoal.process.template import die_with_parent
from shoal.train.api import TrainOptions

_THREADS_OFF = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS", "NUMEXPR_NUM_THREADS")


class Neighbours:
    """Ranks 1 and up of a group that ``meeting``, a file, brings together."""

    def __init__(self, meeting: Path, processes: list[subprocess.Popen[bytes]]) -> None:
        self.meeting = meeting
        self._processes = processes

    @classmethod
    @contextlib.contextmanager
    def start(cls, job: Job, options: TrainOptions, meeting: Path, world_size: int) -> Iterator[Neighbours]:
        """Start them, and end them when this is left. Each gets the job by value over its standard input."""
        from shoal.train.driver import portable
        from shoal.train.joined import work_for

        meeting.unlink(missing_ok=True)
        portable(job)
        quiet = replace(options, on_event=None, cluster=None, tensorboard=False)
        found = cls(meeting, [])
        try:
            for rank in range(1, world_size):
                found._processes.append(start_process(work_for, job, quiet, str(meeting), rank, world_size))
            yield found
        finally:
            found._end()
            meeting.unlink(missing_ok=True)

    def check(self) -> None:
        """WorkerLostError where one of them has gone."""
        for rank, process in enumerate(self._processes, 1):
            code = process.poll()
            if code:
                cause = signal.Signals(-code).name if code < 0 else f"exit code {code}"
                raise WorkerLostError(
                    f"Worker {rank} died ({cause}), and without shared memory nobody can take its place; "
                    "go on from the last checkpoint with --resume."
                )

    def _end(self) -> None:
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=2)
            if process.poll() is None:
                process.kill()
            process.wait()
            if process.stdin is not None:
                with contextlib.suppress(OSError):
                    process.stdin.close()


def start_process(work: Callable[..., Any], *arguments: Any) -> subprocess.Popen[bytes]:
    """Start a process that calls a function of a module with these arguments, which it gets over its standard input.

    It ends when this process does; it ends with code 1 where the function raises, and says why only where that is a bug.
    """
    payload = dumps((work, arguments))
    environment = {**os.environ, **dict.fromkeys(_THREADS_OFF, "1")}
    root = str(Path(__file__).resolve().parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    process = subprocess.Popen(
        [sys.executable, "-m", "shoal.train.neighbours"], stdin=subprocess.PIPE, env=environment, start_new_session=True
    )
    assert process.stdin is not None
    paths = dumps(list(sys.path))
    for part in (paths, payload):
        process.stdin.write(len(part).to_bytes(8, "big") + part)
    process.stdin.flush()
    return process


def _read() -> Any:
    size = int.from_bytes(sys.stdin.buffer.read(8), "big")
    return cloudpickle.loads(sys.stdin.buffer.read(size))


def _end_with_parent() -> None:
    """The pipe from the parent closes when it dies, on any system."""
    sys.stdin.buffer.read(1)
    os._exit(1)


def main() -> int:
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # What user code prints must not get between the lines that a command promises on standard output.
    os.dup2(2, 1)
    sys.path[:] = _read()
    work, arguments = _read()
    LateDynamo()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        work(*arguments)
    except BaseException as error:
        # Rank 0 has heard of it and says it; only what is no error of the job's or shoal's own is worth a word here.
        failure = Failure.of(error)
        if not failure.kind and not isinstance(error, KeyboardInterrupt):
            print(failure.traceback_text, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    # A daemon thread that reads standard input must not be met by the interpreter's end.
    os._exit(code)
