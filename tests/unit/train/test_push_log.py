"""Whether a log is kept, and what of a log becomes of a checkpoint's bytes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from shoal import tensorfile
from shoal.errors import PlanError
from shoal.plan import Plan
from shoal.train.push_log import wants_log
from shoal.train.replay import LoggedTensors, tell_epochs
from shoal.train.update import Applied
from shoal.train.update_log import Commit, put_lines, read_rows, rows_payload

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


def test_what_is_changed_of_a_checkpoint_changes_no_file(tmp_path: Path) -> None:
    path = tmp_path / "state.safetensors"
    tensors = {"weights/a": torch.arange(40.0), "scalars/a": torch.arange(3, dtype=torch.uint8)}
    tensorfile.write(path, tensors)
    before = path.read_bytes()
    with LoggedTensors(path) as found:
        assert sorted(found.keys()) == sorted(tensors)
        assert all(found.get_tensor(name).equal(tensor) for name, tensor in tensors.items())
        # Two lines of 16 numbers and the half one at the tensor's end.
        at = found.bytes.tobytes().index(tensors["weights/a"].numpy().tobytes())
        lines = torch.full((2, 16), -1.0).numpy()
        payload = np.array([2, 160], np.int64).tobytes() + np.array([1, 2], np.int64).tobytes() + lines.tobytes()
        put_lines(found.bytes, at, memoryview(payload))
        changed = found.get_tensor("weights/a")
        assert changed[:16].equal(torch.arange(16.0)) and changed[16:].equal(torch.full((24,), -1.0))
        assert found.get_tensor("scalars/a").equal(tensors["scalars/a"])
    assert path.read_bytes() == before


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
