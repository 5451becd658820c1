"""Named sets of arrays in the cache folder: memory-mapped, checked, replaced as a whole.

A set is a folder of ``.npy`` files with a ``stamp.json``. The first opening on a machine compares every array with its
pinned SHA-256 and writes sizes and modification times to the stamp; later ones compare only these. Ownership:
whoever holds the lock file builds; a set appears by one rename, so readers see all of it or nothing and need no
lock; a set that is replaced stays valid for those who have it mapped.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shoal.errors import DataError

Say = Callable[[str], None]
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True, kw_only=True)
class ArraySpec:
    """What an array must be: shape, dtype (with its byte order), and the SHA-256 of its bytes in C order, in hex."""

    shape: tuple[int, ...]
    dtype: str
    sha256: str


@dataclass(frozen=True)
class Origin:
    """One place that data can come from.

    ``fill(scratch, arrays, say)`` writes the arrays, with an empty folder for its downloads, or raises DataError
    with a short reason; ``label`` names the place in messages.
    """

    label: str
    fill: Callable[[Path, Arrays, Say], None]


class ArrayStore:
    """One set of arrays.

    Args:
        root: the folder that holds the sets; made where it is missing.
        name: the set's folder in it.
        specs: the arrays.
        wait_s: how long to wait for another process that is building the same set.
    """

    def __init__(self, root: Path, name: str, specs: Mapping[str, ArraySpec], wait_s: float = 1800.0) -> None:
        self.path = root / name
        self._root, self._name, self._specs, self._wait_s = root, name, dict(specs), wait_s

    def open(self, check: bool = False) -> Arrays | None:
        """Return the arrays, mapped read-only, or None where they are missing or damaged.

        ``check`` compares the checksums (0.1 to 0.5 s for 200 MB) also where the stamp says that it was done.
        """
        # Asked before the files are opened: a stamped set is sound and never replaced, so what is opened then is it.
        trusted = not check and self._is_stamped()
        try:
            arrays: Arrays = {
                name: np.load(self._file(name), mmap_mode="r", allow_pickle=False) for name in self._specs
            }
        except (OSError, ValueError, EOFError):
            return None
        if trusted:
            return arrays
        if self.damaged(arrays):
            return None
        with contextlib.suppress(OSError):  # a cache that may not be written is checked every time
            self._write_stamp(self.path)
        return arrays

    def damaged(self, arrays: Mapping[str, np.ndarray]) -> str | None:
        """Return the name of the first array that is not what its spec says, or None where all are."""
        for name, spec in self._specs.items():
            array = arrays[name]
            if array.shape != spec.shape or array.dtype != np.dtype(spec.dtype) or not array.flags.c_contiguous:
                return name
            if hashlib.sha256(np.asarray(array).data.cast("B")).hexdigest() != spec.sha256:
                return name
        return None

    def build(self, origins: list[Origin], say: Say) -> Arrays:
        """Fill the set from the first origin that can, and return it opened; another process's finished work is taken.

        Raises DataError with the reasons of all origins, or where the folder cannot be written or another process
        builds for longer than ``wait_s``.
        """
        try:
            self._root.mkdir(parents=True, exist_ok=True)
            with self._lock(say):
                arrays = self.open()
                return arrays if arrays is not None else self._build(origins, say)
        except OSError as error:
            raise DataError(f"The cache {self._root} cannot be written ({error.strerror or error}).") from error

    def _build(self, origins: list[Origin], say: Say) -> Arrays:
        for leftover in self._root.glob(f".{self._name}-*"):  # of a build that was killed: we hold the lock
            shutil.rmtree(leftover, ignore_errors=True)
        reasons = []
        for origin in origins:
            with tempfile.TemporaryDirectory(dir=self._root, prefix=f".{self._name}-") as scratch:
                try:
                    return self._build_from(origin, Path(scratch), say)
                except DataError as error:
                    reasons.append(f"{origin.label}: {error}")
                    say(reasons[-1])
        raise DataError("; ".join(reasons))

    def _build_from(self, origin: Origin, scratch: Path, say: Say) -> Arrays:
        new, downloads = scratch / "arrays", scratch / "downloads"
        new.mkdir()
        downloads.mkdir()
        filled = {name: _new_array(new / f"{name}.npy", spec) for name, spec in self._specs.items()}
        origin.fill(downloads, filled, say)
        damaged = self.damaged(filled)
        if damaged is not None:
            raise DataError(f"its {damaged} are not the published ones (SHA-256 differs)")
        del filled
        for name in self._specs:
            with (new / f"{name}.npy").open("rb+") as file:
                os.fsync(file.fileno())
        self._write_stamp(new)
        if self.path.exists():
            self.path.rename(scratch / "damaged")
        new.rename(self.path)
        arrays = self.open()
        if arrays is None:
            raise DataError(f"{self.path} was damaged right after it was written")
        return arrays

    @contextlib.contextmanager
    def _lock(self, say: Say) -> Iterator[None]:
        """Hold the lock file. The system frees it when its holder dies, however it dies."""
        import fcntl

        deadline = time.monotonic() + self._wait_s
        with (self._root / f"{self._name}.lock").open("w") as file:
            said = False
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise DataError(
                            f"Another process has been preparing {self.path} for over {self._wait_s:.0f} s; "
                            "try again when it has finished."
                        ) from None
                    if not said:
                        say(f"Another process is preparing {self._name}; waiting for it.")
                        said = True
                    time.sleep(0.1)
                except OSError:
                    break  # a file system without locks: two may build, the later rename wins, both are right
            yield

    def _file(self, name: str) -> Path:
        return self.path / f"{name}.npy"

    def _is_stamped(self) -> bool:
        from shoal.cluster.cache import read_json

        try:
            return read_json(self.path / "stamp.json") == self._stamp(self.path)
        except OSError:
            return False

    def _stamp(self, folder: Path) -> dict[str, list[int | str]]:
        """What says that a file has not changed since its checksum was right: size, time, and the sum itself."""
        stamp: dict[str, list[int | str]] = {}
        for name, spec in self._specs.items():
            status = (folder / f"{name}.npy").stat()
            stamp[name] = [status.st_size, status.st_mtime_ns, spec.sha256]
        return stamp

    def _write_stamp(self, folder: Path) -> None:
        from shoal.cluster.cache import write_json

        write_json(folder / "stamp.json", self._stamp(folder))


def _new_array(file: Path, spec: ArraySpec) -> np.ndarray:
    array = np.lib.format.open_memmap(file, mode="w+", dtype=np.dtype(spec.dtype), shape=spec.shape)
    if hasattr(os, "posix_fallocate"):
        # Otherwise a disk that fills up later would kill the process with SIGBUS instead of raising OSError here.
        with file.open("rb+") as handle:
            os.posix_fallocate(handle.fileno(), 0, file.stat().st_size)
    return array
