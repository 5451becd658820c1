"""What a server begins with that comes in the place of another: its part of a checkpoint, which it reads by itself.

Nothing of it goes through the lead: weights and optimizer state are copied from the file, mapped, to where the server has them,
while another thread looks whether the file is what was written.
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
        with ThreadPoolExecutor(1, "shoal-checksum") as threads:
            looked = threads.submit(checkpoints.damage, found, [found.state.name])
            try:
                _refuse(found, checkpoints.damage(found, [n for n in found.meta["sha256"] if n != found.state.name]))
                self._fill(found, kept)
            except Exception:
                # A damaged file may be read as anything.
                _refuse(found, looked.result())
                raise
            _refuse(found, looked.result())
        # Where another checkpoint has to be taken up after all, no table may have rows of this one.
        put_rows(found.path, self._placement, self._server, self._shard.tables)

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


def _refuse(found: Checkpoint, reason: str) -> None:
    if reason:
        raise Damaged(f"{found.path} is damaged: {reason}")
