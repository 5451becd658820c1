"""Whether a log is kept, and what of a log becomes of a checkpoint's bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from shoal import tensorfile
from shoal.comm.arena import Arena
from shoal.comm.grid import Grid
from shoal.comm.memory import SharedMemory
from shoal.comm.store import Store, arena_layout
from shoal.errors import PlanError
from shoal.plan import Plan
from shoal.ps.log import Kind, LogWriter, read
from shoal.train import checkpoint as checkpoints
from shoal.train.checkpoint import FileLayout
from shoal.train.describe import describe
from shoal.train.push_log import wants_log
from shoal.train.replay import LoggedTensors, Replay, SessionLog, tell_epochs
from shoal.train.update import Applied
from shoal.train.update_log import Commit, log_name, read_rows, rows_payload

ASYNC = Plan.parse("ps=1,workers=2,async")


def test_a_run_keeps_a_log_where_it_is_told_or_has_done_so(tmp_path: Path) -> None:
    assert not wants_log(None, ASYNC, tmp_path) and wants_log(True, ASYNC, tmp_path)
    (tmp_path / "push-log").mkdir()
    assert wants_log(None, ASYNC, tmp_path) and not wants_log(False, ASYNC, tmp_path)
    assert not wants_log(None, Plan.parse("dp=2"), tmp_path)
    copied = Plan.parse("ps=2,workers=2,async,replicas=1")
    assert not wants_log(None, copied, tmp_path)
    for plan, said in ((Plan.parse("dp=2"), "push_log keeps the pushes of parameter servers"), (copied, "leave one of them")):
        with pytest.raises(PlanError, match=said):
            wants_log(True, plan, tmp_path)


def test_a_checkpoint_is_read_as_the_log_has_left_it(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    tensors = {"weights/a": torch.arange(40.0), "scalars/a": torch.arange(3, dtype=torch.uint8)}
    tensors["weights/b"] = torch.zeros(1 << 15)
    tensorfile.write(path, tensors)
    before = path.read_bytes()
    a, scalars, b = (before.index(tensors[name].numpy().tobytes()) for name in tensors)
    writer = LogWriter(tmp_path, "server-0")
    writer.begin(0, 0)
    writer.add(Kind.BYTES, [(b, (torch.ones(1 << 15).numpy(),))])
    # Two lines of 16 numbers and the half one at the tensor's end.
    lines = torch.full((2, 16), -1.0).numpy()
    writer.add(Kind.LINES, [(a, (np.array([2, 160], np.int64), np.array([1, 2], np.int64), lines))])
    writer.add(Kind.BYTES, [(scalars + 1, (b"\7",)), (b + 4, (torch.full((1,), 2.0).numpy(),))])
    writer.commit(b"")
    writer.close()
    (push,) = read(tmp_path, "server-0")
    memory = SharedMemory.create(1 << 20)
    for frames in ((), push.frames):
        found = LoggedTensors(path, frames)
        expected = {name: tensor.clone() for name, tensor in tensors.items()}
        if frames:
            expected["weights/a"][16:] = -1.0
            expected["scalars/a"][1] = 7
            expected["weights/b"][:] = torch.tensor([1.0, 2.0] + [1.0] * ((1 << 15) - 2))
        assert sorted(found.keys()) == sorted(tensors)
        for name, tensor in expected.items():
            assert found.get_tensor(name).equal(tensor)
            place = memory.tensor(64, tensor.numel(), tensor.dtype)
            found.fill(name, place, memory)
            assert place.equal(tensor)
        wider = torch.empty(40, dtype=torch.float64)
        found.fill("weights/a", wider)
        assert wider.equal(expected["weights/a"].double())
    memory.close()
    assert path.read_bytes() == before


def test_what_is_torn_counts_for_no_server_and_a_checkpoint_that_the_log_covers_may_be_damaged(tmp_path: Path) -> None:
    model = nn.ParameterDict({"w": nn.Parameter(torch.zeros(600))})
    table = describe(model, torch.optim.SGD(model.parameters(), lr=1.0))
    store = Store(Arena.create(arena_layout(table, Grid(dp=1))), table)
    checkpoints.PartWriter(store, tmp_path / "checkpoints", 0).write_all()
    first = checkpoints.complete(tmp_path / "checkpoints", 0, {})
    layout = FileLayout(table)
    at = len(layout.header)
    # Server 0 has the first half of the weights, server 1 all else.
    own = ([(0, 1200)], [(1200, 2400), (2400, layout.size - at)])
    session = SessionLog(tmp_path / "push-log" / "0001", servers=2, workers=1, team=1, first=0)
    writers = [LogWriter(session.path, log_name(server), segment_bytes=4000) for server in (0, 1)]
    session.begin()
    for number in range(4):
        for server, writer in enumerate(writers):
            writer.begin(number, 0)
            writer.add(Kind.BYTES, [(at + a, (bytes([number + 1]) * (b - a),)) for a, b in own[server]])
            writer.commit(Commit(np.empty((0, 0)), None).to_bytes())
    for writer in writers:
        writer.close()

    def replayed() -> tuple[checkpoints.Checkpoint | None, LoggedTensors | None]:
        found: list[Replay] = []

        def is_covered(checkpoint: checkpoints.Checkpoint) -> bool:
            found.append(Replay(tmp_path, [session], checkpoint))
            return found[-1].tensors is not None and found[-1].tensors.covers(table)

        newest = checkpoints.newest(tmp_path / "checkpoints", [], is_covered)
        return newest, found[-1].tensors

    def spoil(path: Path, place: int) -> None:
        data = bytearray(path.read_bytes())
        data[place] ^= 1
        path.write_bytes(data)

    # Of the last push a byte that server 1 wrote is another one.
    last = session.pushes(0)[-1][1]
    spoil(last.segment.path, last.frames[0].at)
    spoil(first.state, at)
    newest, tensors = replayed()
    assert newest is not None and tensors is not None
    checkpoints.restore(newest, store, tensors)
    assert bytes(store.weights[0].view(torch.uint8).numpy()) == b"\3" * 2400
    assert [len(read(session.path, log_name(server))) for server in (0, 1)] == [3, 3]
    # What the log does not cover has to be whole, as has what says where everything lies.
    spoil(first.state, 12)
    assert replayed()[0] is None
    spoil(first.state, 12)
    for of_first, _ in session.pushes(0):
        spoil(of_first.segment.path, of_first.frames[0].at)
    assert replayed() == (None, None) and session.pushes(0) == []


def test_rows_and_ends_of_pushes_come_back(tmp_path: Path) -> None:
    keys = np.array([7, -(2**62)], np.int64)
    change = Applied(1, keys, np.array([1, 3], np.uint32), torch.tensor([[1.0, 2.0], [3.0, 4.0]]), 9, 0.5)
    found = read_rows(1, memoryview(b"".join(bytes(memoryview(p).cast("B")) for p in rows_payload(change))), torch.float32)
    assert found.keys.tolist() == keys.tolist() and found.counts.tolist() == [1, 3] and (found.step, found.scale) == (9, 0.5)
    assert found.rows.equal(change.rows)
    end = Commit.from_bytes(Commit(np.arange(6.0).reshape(2, 3), {"steps": 3}, summed=True).to_bytes())
    assert end.rows.tolist() == [[0, 1, 2], [3, 4, 5]] and end.page == {"steps": 3} and end.summed
    empty = Commit.from_bytes(Commit(np.empty((0, 0)), None).to_bytes())
    assert empty.rows.shape == (0, 0) and empty.page is None and not empty.summed


def test_an_epoch_that_came_to_the_log_and_to_no_event_before_all_were_killed_is_told(tmp_path: Path) -> None:
    (tmp_path / "events.jsonl").write_text('{"t": 1.0, "kind": "epoch", "epoch": 1, "loss": 3.0}\n')
    logged = [
        {"entry": {"epoch": k, "loss": 2.0 / k}, "eval_loss": 0.0, "beside": {"step": 5 * k, "train_s": 1.0, "eval_s": 0.5}}
        for k in (1, 2)
    ]
    told: list[tuple[str, dict[str, object]]] = []
    tell_epochs(tmp_path, logged, lambda kind, **fields: told.append((kind, fields)))
    assert told == [("epoch", {"epoch": 2, "loss": 1.0, "step": 10, "train_s": 1.0, "eval_s": 0.5})]
