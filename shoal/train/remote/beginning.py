"""What a server begins with that comes in the place of another: its part of a checkpoint, which it reads by itself.

Nothing of it goes through the lead: weights and optimizer state are copied from the file, mapped, to where the server has them,
and rows to its tables, while another thread looks whether the files are what was written. Of rows it reads, and looks at, only
files that have some of its own.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath

from shoal.comm.table import ParameterTable
from shoal.errors import RequestError
from shoal.ps.placement import Placement
from shoal.ps.requests import Damaged
from shoal.ps.shard import Kept, Shard
from shoal.train import checkpoint as checkpoints
from shoal.train.checkpoint import Checkpoint
from shoal.train.remote.log import numbers_in
from shoal.train.remote.state import put_rows, snapshot_of
from shoal.train.row_tables import needed


class FromCheckpoint:
    """Lets a server's shard hold its part of a checkpoint; implements ``TakeUp``.

    Args:
        run: the run's directory, outside of which nothing is read.
        table: the model's.
        server: its number.
    """

    def __init__(self, run: Path, shard: Shard, table: ParameterTable, placement: Placement, server: int) -> None:
        self._run, self._shard, self._table = run, shard, table
        self._placement, self._server = placement, server

    def __call__(self, name: str, kept: Kept) -> None:
        parts = PurePosixPath(name).parts
        if ".." in parts or PurePosixPath(name).is_absolute():
            raise RequestError(f"{name} is no checkpoint of this run.")
        found = _described(self._run / name)
        files = [found.state.name, *self._read_of(found)]
        with ThreadPoolExecutor(1, "shoal-checksum") as threads:
            looked = threads.submit(checkpoints.damage, found, files)
            try:
                self._fill(found, kept)
                put_rows(found.path, self._placement, self._server, self._shard.tables)
            except Exception:
                # A damaged file may be read as anything.
                self._refuse(found, looked.result())
                raise
            self._refuse(found, looked.result())

    def _refuse(self, found: Checkpoint, reason: str) -> None:
        """Where another checkpoint has to be taken up after all, no table may have rows of this one."""
        if reason:
            for table in self._shard.tables.values():
                table.clear()
            raise Damaged(f"{found.path} is damaged: {reason}")

    def _read_of(self, found: Checkpoint) -> list[str]:
        """The files of a checkpoint that are read here, but for its tensors: of rows only those that have some of its own."""
        names = [name for name in found.meta["sha256"] if name != found.state.name]
        for number, table in self._shard.tables.items():
            files = [name for name in names if name.startswith(f"rows-{number}-")]
            shards = self._placement.row_shards_of(self._server, number)
            own = {path.name for path in needed([found.path / name for name in files], table.spec, shards)}
            names = [name for name in names if name in own or name not in files]
        return names

    def _fill(self, found: Checkpoint, kept: Kept) -> None:
        checkpoints.check(found, self._table)
        numbers = numbers_in(checkpoints.restore_notes(found))
        with checkpoints.open_tensors(found) as file:
            pieces = self._placement.pieces_of(self._server)
            own = snapshot_of(self._table, pieces, lambda kind, name: file.get_tensor(f"{kind}/{name}"), numbers, kept)
            self._shard.restore(own)


def _described(path: Path) -> Checkpoint:
    try:
        return checkpoints.described(path)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Damaged(f"{path} is damaged: {error}") from None
