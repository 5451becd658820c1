"""One side of benchmarks/parameter_server.py: seconds from kill -9 to a table of parameters that is whole again.

* ``arena``: a server in the midst of a push; until its successor, a process that is forked then, has applied that push.
* ``log``: everything; until a checkpoint and the write-ahead log behind it are in another arena. ``read_s``: of that for finding
  what the log has, ``hash_s``: for finding out whether it and the checkpoint are whole, ``apply_s``: for bringing it to the
  arena; ``cpu_s``: of processor time. ``start_s``: beside it, for making the arena.
* ``rows``: the same for a table of rows by key, all of them in a checkpoint, and behind it a log of gradients.
* ``remote``: a server of a run that shares no memory and keeps a log, trained for real; until another one has its part of the
  checkpoint and has done again what the log has. ``begin_s``: of that until somebody has noticed and another process is there,
  ``checkpoint_s``: for its part of the checkpoint, which is looked at as a whole, ``log_s``: for what the log has behind it.
* ``remote_rows``: the same where nearly all that the server has are rows by key.
* ``chain``: the head of a chain of two servers; until its successor has acknowledged the next push. ``rejoin_s``: until a
  replacement holds all of it as the tail.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import shoal
from benchmarks.peers.ps_shoal import fork, serve
from shoal.axes.server_async import PushingWorker, make_bells
from shoal.axes.waiting import Waiting
from shoal.comm.arena import Arena, Note, Order
from shoal.comm.grid import Grid
from shoal.comm.store import Store, arena_layout
from shoal.observe.events import read_events
from shoal.plan import Plan
from shoal.ps import log as log_of_server
from shoal.ps.client import Client, Patience
from shoal.ps.dense import DensePart, cut
from shoal.ps.endpoint import Endpoint, RunKeys
from shoal.ps.ledger import regions
from shoal.ps.replication import ChainServer, follow, lead
from shoal.ps.shard import Push, Shard
from shoal.ps.spec import TableSpec
from shoal.ps.table import Rows
from shoal.train import checkpoint as checkpoints
from shoal.train.describe import describe
from shoal.train.replay import FOLDER, SESSION, Replay, SessionLog, sessions
from shoal.train.row_tables import RunTables
from shoal.train.saved import Applied
from shoal.train.update_log import Commit, log_name, rows_payload

PLAN = Plan(ps=1, workers=1, mode="async")
_PUSHES = 3
_WIDTH, _EVERY, _LEAST_BYTES = 32, 40, 1 << 20


class Place:
    """An arena for one server and one worker."""

    def __init__(self, nbytes: int) -> None:
        model = nn.ParameterDict({"weight": nn.Parameter(torch.zeros(nbytes // 4))})
        self.optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        table = describe(model, self.optimizer)
        self.arena = Arena.create(arena_layout(table, Grid(dp=1, servers=1), further=regions(1, 1, 1)))
        self.store, self.bells = Store(self.arena, table), make_bells(1)
        self.arena.supervisor.post(Order.STEPS_ALLOWED, 1 << 30)
        self.arena.supervisor.write(Note.UNITS_SEEN, 1 << 40)

    def serve(self, log_dir: str | None = None) -> None:
        serve(self.store, self.optimizer, PLAN, self.bells[0], log_dir)

    def push(self, worker: PushingWorker) -> None:
        claim = worker.claims.claim(0)
        worker.empty_stripe()
        self.store.gradient(0, 0).fill_(1.0)
        self.store.touched[0, 0] = 1
        worker.push(claim.unit, 1.0)  # type: ignore[union-attr]

    def worker(self) -> PushingWorker:
        return PushingWorker(self.store, 0, Waiting(spin_s=0.0), PLAN, self.bells)


def arena(nbytes: int) -> dict[str, float]:
    place = Place(nbytes)
    worker = place.worker()
    server = fork(place.serve)
    place.push(worker)
    worker.await_applied()
    place.push(worker)
    slot = place.arena.servers[0]
    while slot.note(Note.CHUNK_DONE) < 5 or place.store.arena.servers[0].note(Note.PUSH_IN_WORK) < 2:
        time.sleep(1e-4)
    os.kill(server, signal.SIGKILL)
    began = time.monotonic()
    os.waitpid(server, 0)
    successor = fork(place.serve)
    worker.await_applied()
    found = time.monotonic() - began
    assert bool((place.store.weights[0] == -2.0).all())
    place.arena.supervisor.post(Order.OVER, 1)
    os.eventfd_write(place.bells[0], 1)
    os.waitpid(successor, 0)
    return {"recovery_s": found}


def log(nbytes: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory(dir=".") as scratch:
        run = Path(scratch)
        ready, told = os.pipe()

        def train() -> None:
            place = Place(nbytes)
            checkpoints.PartWriter(place.store, run / "checkpoints", 0).write_all()
            checkpoints.complete(run / "checkpoints", 0, {"epochs_done": 0, "history": []})
            folder = run / FOLDER / "0001"
            folder.mkdir(parents=True)
            (folder / SESSION).write_text(json.dumps({"servers": 1, "workers": 1, "team": 1, "first": 0}))
            server = fork(lambda: place.serve(str(folder)))
            worker = place.worker()
            for _ in range(_PUSHES):
                place.push(worker)
                worker.await_applied()
            while place.arena.servers[0].note(Note.LOGGED) < _PUSHES:
                time.sleep(0.01)
            os.write(told, b"%d" % server)
            time.sleep(3600)

        family = fork(train)
        server = int(os.read(ready, 64))
        for pid in (family, server):
            os.kill(pid, signal.SIGKILL)
        os.waitpid(family, 0)
        # Its memory is made before anything is asked for, as that of a run is.
        began = time.monotonic()
        place = Place(nbytes)
        start_s = time.monotonic() - began
        recovered = recover(place, run)
        assert bool((place.store.weights[0] == -float(_PUSHES)).all())
        return {**recovered, "start_s": start_s}


def rows(nbytes: int) -> dict[str, float]:
    spec = TableSpec(width=_WIDTH)
    count = nbytes // (4 * (_WIDTH + spec.state))
    keys = np.arange(count, dtype=np.int64) * 7919
    with tempfile.TemporaryDirectory(dir=".") as scratch:
        run = Path(scratch)

        def train() -> None:
            place, tables = Place(_LEAST_BYTES), RunTables((spec,), run / "cold")
            values = torch.ones(count, _WIDTH + spec.state)
            tables.tables[0].put(Rows(keys, values, np.ones(count, np.uint32), np.zeros(count, np.int64)))
            checkpoints.PartWriter(place.store, run / "checkpoints", 0).write_all()
            tables.write(checkpoints.part_path(run / "checkpoints", 0))
            checkpoints.complete(run / "checkpoints", 0, {"epochs_done": 0, "history": []})
            session = SessionLog(run / FOLDER / "0001", servers=1, workers=1, team=1, first=0)
            log = log_of_server.LogWriter(session.path, log_name(0))
            session.begin()
            for number in range(_PUSHES):
                own = keys[number :: _EVERY].copy()
                gradients = Applied(0, own, np.ones(len(own), np.uint32), torch.ones(len(own), _WIDTH), number, 1.0)
                log.begin(number, 0)
                log.add(log_of_server.Kind.ROWS, [(0, rows_payload(gradients))])
                log.commit(Commit(np.empty((0, 0)), None).to_bytes())
            log.close()

        os.waitpid(fork(train), 0)
        began = time.monotonic()
        place, tables = Place(_LEAST_BYTES), RunTables((spec,), run / "cold")
        start_s = time.monotonic() - began
        found = recover(place, run, tables)
        changed = tables.tables[0].pull(keys[: _PUSHES + 1].copy())
        assert bool((changed[:_PUSHES] != 1.0).all()) and bool((changed[_PUSHES] == 1.0).all())
        tables.close()
        return {**found, "start_s": start_s}


def recover(place: Place, run: Path, tables: RunTables | None = None) -> dict[str, float]:
    """Bring back what a run had, as its session does; the seconds that it takes, and those of its parts."""
    seconds: dict[str, float] = {}
    cpu_began, began = time.process_time(), time.monotonic()
    replays: list[Replay] = []

    def is_covered(checkpoint: checkpoints.Checkpoint) -> bool:
        replays[:] = [Replay(run, sessions(run), checkpoint)]
        tensors = replays[0].tensors
        return tensors is not None and tensors.covers(place.store.table)

    with (
        counted(SessionLog, "pushes", seconds, "read_s"), counted(log_of_server, "first_torn", seconds, "hash_s"),
        counted(checkpoints, "damage", seconds, "hash_s"),
    ):  # fmt: skip
        found = checkpoints.newest(run / "checkpoints", None, is_covered)
    assert found is not None
    with counted(checkpoints, "_restore_tensors", seconds, "apply_s"):
        checkpoints.restore(found, place.store, replays[0].tensors)
    if tables is not None:
        with counted(RunTables, "restore", seconds, "apply_s"), counted(Replay, "fill", seconds, "apply_s"):
            tables.restore(found.path, found.step)
            replays[0].fill(tables)
    taken_s, cpu_s = time.monotonic() - began, time.process_time() - cpu_began
    return {"recovery_s": taken_s, "cpu_s": cpu_s, **seconds}


@contextlib.contextmanager
def counted(owner: Any, name: str, seconds: dict[str, float], part: str) -> Iterator[None]:
    """Add the seconds that a function takes to a part."""
    function = getattr(owner, name)

    def timed(*args: Any, **kwargs: Any) -> Any:
        began = time.monotonic()
        try:
            return function(*args, **kwargs)
        finally:
            seconds[part] = seconds.get(part, 0.0) + time.monotonic() - began

    setattr(owner, name, timed)
    try:
        yield
    finally:
        setattr(owner, name, function)


def chain(nbytes: int) -> dict[str, float]:
    keys, pieces = RunKeys.new(), cut("w", (nbytes // 4,), torch.float32, 0, 0, True)

    def member(told: int) -> None:
        shard = Shard(DensePart(pieces, lambda own: torch.optim.SGD([p for _, p in own], lr=1.0)))
        endpoint = Endpoint(keys)
        os.write(told, endpoint.address.encode())
        ChainServer(shard, endpoint, keys).serve(lambda: False)

    def start() -> tuple[int, str]:
        read, told = os.pipe()
        pid = fork(lambda: member(told))
        return pid, os.read(read, 256).decode()

    (head, at_head), (tail, at_tail) = start(), start()
    client = Client({0: at_head, 1: at_tail}, keys, Patience(deadline_s=300.0, retry_s=10.0))
    follow(client, 0, at_tail)
    lead(client, 0)

    def push(k: int, server: int, whole: bool = False) -> None:
        dense = {p.number: torch.ones(p.numel) for p in (pieces if whole else pieces[:1])}
        client.acknowledged(client.push({server: Push(ids=((0, k, 0),), dense=dense)}))

    push(0, 0, whole=True)
    os.kill(head, signal.SIGKILL)
    began = time.monotonic()
    os.waitpid(head, 0)
    client.disconnect(0)
    lead(client, 1)
    push(1, 1)
    found = {"recovery_s": time.monotonic() - began}
    replacement, address = start()
    began = time.monotonic()
    follow(client, 1, address, anew=True)
    push(2, 1)
    found["rejoin_s"] = time.monotonic() - began
    client.close()
    for pid in (tail, replacement):
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return found


def remote(nbytes: int) -> dict[str, float]:
    class Whole(nn.Module):
        """A parameter whose every element has the gradient 1."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(nbytes // 4))

        def forward(self, samples: torch.Tensor) -> torch.Tensor:
            return (samples >= 0) * self.weight.sum()

    return killed_server(Whole, lambda weights: bool((weights["weight"] == -float(_PUSHES + 1)).all()))


def remote_rows(nbytes: int) -> dict[str, float]:
    count = nbytes // (4 * (_WIDTH + TableSpec(width=_WIDTH).state))

    class Keyed(nn.Module):
        """Rows, of which each step's sample changes some, and next to nothing beside them."""

        def __init__(self) -> None:
            super().__init__()
            self.rows, self.bias = shoal.ps.Embedding(_WIDTH), nn.Parameter(torch.zeros(1))
            self.rows.put_rows(np.arange(count, dtype=np.int64) * 7919, torch.ones(count, _WIDTH))

        def forward(self, samples: torch.Tensor) -> torch.Tensor:
            keys = torch.arange(int(samples[0]), count, _EVERY) * 7919
            return samples * 0 + self.rows(keys).sum() + self.bias

    def is_right(weights: dict[str, torch.Tensor]) -> bool:
        # Whatever the order of the samples was, each has changed its own keys, and nobody the others.
        changed = (weights["rows.rows"] != 1.0).all(1)
        own = (weights["rows.keys"] // 7919) % _EVERY <= _PUSHES
        return len(own) == count and torch.equal(changed, own)

    return killed_server(Keyed, is_right)


def killed_server(model: Callable[[], nn.Module], is_right: Callable[[dict[str, torch.Tensor]], bool]) -> dict[str, float]:
    """Train a model for a few steps on a server that is killed in the midst of them; what its recovery takes.

    Its input is the number of a sample, and there is one for each step; ``is_right``: of the weights at the end.
    """
    with tempfile.TemporaryDirectory(dir=".") as scratch:
        run, go = Path(scratch).resolve() / "run", Path(scratch).resolve() / "go"
        log, steps = run / FOLDER / "0001", _PUSHES + 1

        def loss(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
            """It waits with a push that is not to be made yet."""
            while len(log_of_server.read(log, log_name(0))) == _PUSHES and not go.exists():
                time.sleep(0.05)
            return output.mean()

        job = shoal.Job(
            name="whole", model=model, train_data=lambda: (torch.arange(float(steps)), torch.ones(steps)), batch_size=1, epochs=1,
            loss=loss, optimizer=lambda params: torch.optim.SGD(params, lr=1.0),
        )  # fmt: skip
        os.environ |= {"SHOAL_TRANSPORT": "group", "SHOAL_EXPORT": "0", "SHOAL_CHECKPOINT_S": "100000", "SHOAL_STALL_S": "600"}
        plan = "ps=1,workers=1,async,threads=1,rewrites=none"

        def train() -> None:
            os.dup2(2, 1)
            assert is_right(shoal.train(job, plan=plan, push_log=True, run_dir=run).weights())

        def seen(kind: str) -> list[dict[str, Any]]:
            return list(read_events(run / "events.jsonl", {kind})) if (run / "events.jsonl").exists() else []

        family = fork(train)
        while len(seen("push_ack")) < _PUSHES:
            assert os.waitpid(family, os.WNOHANG) == (0, 0), "the run has ended"
            time.sleep(0.2)
        # What the disk has yet to write is none of a recovery.
        os.sync()
        server = next(p["pid"] for p in json.loads((run / "processes.json").read_text()) if p["role"] == "server")
        os.kill(server, signal.SIGKILL)
        began = time.time()
        while not (recovered := seen("recovered")):
            assert os.waitpid(family, os.WNOHANG) == (0, 0), "the run has ended"
            time.sleep(0.05)
        found = float(recovered[0]["t"]) - began
        parts = recovered[0]["parts_s"]
        go.touch()
        assert os.waitpid(family, 0)[1] == 0
        begins_s = found - parts["checkpoint_s"] - parts["log_s"]
        return {"recovery_s": found, "begin_s": begins_s, **parts}


KINDS = {"arena": arena, "log": log, "rows": rows, "chain": chain, "remote": remote, "remote_rows": remote_rows}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kind", choices=tuple(KINDS), required=True)
    parser.add_argument("--bytes", type=int, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    print(json.dumps(KINDS[options.kind](options.bytes)))


if __name__ == "__main__":
    main()
