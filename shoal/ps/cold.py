"""Rows that have not been used for long, on disk: an LMDB environment, one database for each shard.

LMDB lets several processes read while one writes, survives the death of any of them, and keeps rows sorted, so that what is
written in the order of keys is appended. It does not wait for the disk: what outlives the machine is the checkpoint.
A row that has come back into memory stays here until it is written over; memory counts.
"""

from __future__ import annotations

import itertools
import os
import shutil
import sys
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from shoal.errors import JobFailed, RequestError
from shoal.ps.spec import TableSpec

if TYPE_CHECKING:
    from shoal.ps.table import Rows

_MOST_BYTES = 1 << 42
_META_BYTES = 16


class ColdStore:
    """The store of one table. Every process opens it for itself, after it was forked."""

    def __init__(self, directory: Path | None, spec: TableSpec) -> None:
        """``directory``: made where it is missing; None: a temporary one, that goes with the process that made it."""
        try:
            import lmdb
        except ImportError:
            raise RequestError(
                f"The table {spec.name} has a memory limit, and cold rows are kept by lmdb: pip install 'shoal[ps]'."
            ) from None
        self._lmdb: Any = lmdb
        self._spec = spec
        self._owner = os.getpid() if directory is None else -1
        self._path = Path(tempfile.mkdtemp(prefix="shoal-rows-")) if directory is None else directory
        self._pid = -1
        # Somebody who publishes the rows may be the first to look, as well as whoever writes them.
        self._opening = threading.Lock()
        self._environment: Any = None
        self._databases: list[Any] = []

    def _open(self) -> Any:
        with self._opening:
            return self._open_once()

    def _open_once(self) -> Any:
        if self._pid != os.getpid():
            lmdb = self._lmdb
            try:
                self._path.mkdir(parents=True, exist_ok=True)
                self._environment = lmdb.open(
                    str(self._path), map_size=_MOST_BYTES, max_dbs=self._spec.shards, sync=False, metasync=False,
                    readahead=False, max_readers=512,
                )  # fmt: skip
                self._databases = [
                    self._environment.open_db(b"%d" % shard, integerkey=True) for shard in range(self._spec.shards)
                ]
            except (lmdb.Error, OSError) as error:
                raise self._trouble(error) from None
            self._pid = os.getpid()
        return self._environment

    def write(self, shard: int, keys: np.ndarray, rows: Rows) -> None:
        """Keep rows, sorted by key as unsigned numbers. JobFailed, and nothing is written, where the disk does not take them."""
        meta = np.empty((len(keys), _META_BYTES), np.uint8)
        meta[:, :8] = rows.last.view(np.uint8).reshape(-1, 8)
        meta[:, 8:] = rows.counts.astype(np.int64).view(np.uint8).reshape(-1, 8)
        values = rows.values.view(torch.uint8).numpy()
        packed = np.concatenate([meta, values], axis=1)
        names = np.ascontiguousarray(keys).tobytes()
        size = packed.shape[1]
        flat = packed.tobytes()
        items = [(names[8 * k : 8 * k + 8], flat[size * k : size * (k + 1)]) for k in range(len(keys))]
        try:
            with self._open().begin(write=True, db=self._databases[shard]) as transaction:
                transaction.cursor().putmulti(items)
        except (self._lmdb.Error, OSError) as error:
            raise self._trouble(error) from None

    def read(self, keys: np.ndarray, shards: np.ndarray) -> tuple[np.ndarray, Rows]:
        """Of these keys those that are here: their positions among the given ones, and their rows."""
        at: list[int] = []
        found: list[bytes] = []
        try:
            with self._open().begin() as transaction:
                for k, (key, shard) in enumerate(zip(keys, shards, strict=True)):
                    value = transaction.get(key.tobytes(), db=self._databases[int(shard)])
                    if value is not None:
                        at.append(k)
                        found.append(value)
        except (self._lmdb.Error, OSError) as error:
            raise self._trouble(error) from None
        positions = np.array(at, np.int64)
        return positions, self._unpack(keys[positions], b"".join(found))

    def keys(self, shard: int, begin: int, count: int) -> np.ndarray:
        """The next keys from ``begin`` on, both as unsigned numbers; sorted as such."""
        found: list[bytes] = []
        with self._open().begin(db=self._databases[shard]) as transaction:
            cursor = transaction.cursor()
            if cursor.set_range(begin.to_bytes(8, sys.byteorder)):
                found = [bytes(name) for name in itertools.islice(cursor.iternext(values=False), count)]
        return np.frombuffer(b"".join(found), np.int64).copy()

    def forget(self, shard: int, keys: np.ndarray | None) -> None:
        """Delete the rows of these keys; None: all."""
        try:
            with self._open().begin(write=True) as transaction:
                if keys is None:
                    transaction.drop(self._databases[shard], delete=False)
                for key in [] if keys is None else keys:
                    transaction.delete(key.tobytes(), db=self._databases[shard])
        except (self._lmdb.Error, OSError) as error:
            raise self._trouble(error) from None

    def all(self, shard: int) -> Rows:
        """Everything of a shard."""
        names: list[bytes] = []
        values: list[bytes] = []
        with self._open().begin(db=self._databases[shard]) as transaction:
            for name, value in transaction.cursor():
                names.append(name)
                values.append(value)
        return self._unpack(np.frombuffer(b"".join(names), np.int64), b"".join(values))

    def _unpack(self, keys: np.ndarray, data: bytes) -> Rows:
        from shoal.ps.table import Rows

        spec = self._spec
        size = (spec.width + spec.state) * spec.dtype.itemsize
        packed = np.frombuffer(data, np.uint8).reshape(len(keys), _META_BYTES + size)
        meta = np.ascontiguousarray(packed[:, :_META_BYTES]).view(np.int64).reshape(-1, 2)
        return Rows(keys.copy(), spec.values(packed[:, _META_BYTES:]), meta[:, 1].astype(np.uint32), meta[:, 0].copy())

    def _trouble(self, error: Exception) -> JobFailed:
        return JobFailed(
            f"Cold rows of the table {self._spec.name} could not be kept in {self._path} ({error}); make room there, or give "
            "the table more memory. No row was lost: they are still in memory."
        )

    def close(self) -> None:
        if self._pid == os.getpid() and self._environment is not None:
            self._environment.close()
            self._pid = -1
        if self._owner == os.getpid():
            shutil.rmtree(self._path, ignore_errors=True)

    def __del__(self) -> None:
        if getattr(self, "_owner", -1) == os.getpid():
            shutil.rmtree(self._path, ignore_errors=True)
