from __future__ import annotations

import math
import struct
import sys
from pathlib import Path

import pytest

from shoal.errors import RequestError
from shoal.observe.tensorboard import TensorBoardObserver


def scalars(folder: Path) -> dict[tuple[str, int], float]:
    """Read the event files back: records of length, checksum, bytes, checksum."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for path in folder.iterdir():
        data, at = path.read_bytes(), 0
        while at < len(data):
            (length,) = struct.unpack_from("<Q", data, at)
            event = Event.FromString(data[at + 12 : at + 12 + length])
            at += length + 16
            found.update({(value.tag, event.step): value.simple_value for value in event.summary.value})
    return found


def test_steps_and_epochs_can_be_read_back(tmp_path: Path) -> None:
    observer = TensorBoardObserver(tmp_path)
    observer(
        {"t": 1.0, "kind": "step", "step": 7, "loss": 0.5, "metrics": {"auc": 0.75}, "samples": 10, "step_s": 0.25}
    )
    observer({"t": 1.5, "kind": "step", "step": 8, "loss": math.nan, "metrics": {}, "samples": 10, "step_s": 0.0})
    observer({"t": 2.0, "kind": "epoch", "epoch": 2, "loss": 0.25, "eval_auc": 0.5, "samples_per_s": 64.0, "step": 8})
    observer({"t": 3.0, "kind": "run_end", "status": "done"})
    observer({"t": 4.0, "kind": "step", "step": 9, "loss": 0.5, "samples": 10, "step_s": 0.25})  # after its end
    assert scalars(tmp_path) == {
        ("step/loss", 7): 0.5,
        ("step/auc", 7): 0.75,
        ("step/samples_per_s", 7): 40.0,
        ("epoch/loss", 2): 0.25,
        ("epoch/eval_auc", 2): 0.5,
        ("epoch/samples_per_s", 2): 64.0,
    }


def test_without_the_package_one_sentence_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(RequestError, match="pip install tensorboardX"):
        TensorBoardObserver(tmp_path)
