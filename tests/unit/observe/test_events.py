from __future__ import annotations

import json
import math
import os
import re
from pathlib import Path

import numpy as np
import pytest

from shoal.errors import RunDirectoryError
from shoal.observe.events import KINDS, EventLog, read_events, to_json

ROOT = Path(__file__).parents[3]


def log_at(path: Path) -> EventLog:
    return EventLog(path, clock=lambda: 12.5)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_rare_event_is_in_the_file_at_once_and_a_step_after_flush(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log = log_at(path)
    returned = log.write("warning", text="two cores, four workers")
    assert returned == {"t": 12.5, "kind": "warning", "text": "two cores, four workers"}
    assert lines(path) == [returned]
    log.write("step", step=1, loss=0.5)
    assert len(lines(path)) == 1
    log.flush()
    assert lines(path)[1] == {"t": 12.5, "kind": "step", "step": 1, "loss": 0.5}
    log.write("step", step=2, loss=0.4)
    log.write("stop", step=2, reason="steps")
    assert [event["kind"] for event in lines(path)] == ["warning", "step", "step", "stop"]


def test_many_steps_do_not_pile_up_in_memory(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log = log_at(path)
    for step in range(5000):
        log.write("step", step=step, loss=1.0)
    assert path.stat().st_size > 100_000
    log.close()
    assert [event["step"] for event in read_events(path)] == list(range(5000))


def test_unknown_kinds_and_fields_are_refused(tmp_path: Path) -> None:
    log = log_at(tmp_path / "events.jsonl")
    with pytest.raises(AssertionError, match="explosion"):
        log.write("explosion")
    with pytest.raises(AssertionError, match="colour"):
        log.write("step", step=1, colour="red")
    log.write("epoch", epoch=1, loss=1.0, accuracy=0.5, eval_accuracy=0.4)  # named by the job
    assert len(lines(tmp_path / "events.jsonl")) == 1


def test_what_is_not_finite_becomes_null_in_the_file_only(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log = log_at(path)
    returned = log.write("epoch", epoch=1, loss=math.nan, samples_per_s=-math.inf, depth=[{"a": math.inf}])
    assert math.isnan(returned["loss"])
    found = lines(path)[0]
    assert (found["loss"], found["samples_per_s"], found["depth"]) == (None, None, [{"a": None}])


def test_numpy_numbers_and_paths_are_written_plainly() -> None:
    value = {"a": np.float32(0.5), "b": np.int64(3), "c": Path("runs/x"), "d": np.float32("nan")}
    value |= {"e": (1, 2), "f": {2, 1}}
    assert json.loads(to_json(value)) == {"a": 0.5, "b": 3, "c": "runs/x", "d": None, "e": [1, 2], "f": [1, 2]}


def test_half_a_line_at_the_end_is_left_out_and_removed_by_the_next_writer(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    whole = '{"t": 1.0, "kind": "warning", "text": "' + "x" * 100_000 + '"}\n'
    path.write_text(whole + whole[:70_000])
    assert len(list(read_events(path))) == 1
    with log_at(path) as log:
        log.write("warning", text="second")
    assert [event["text"][:6] for event in read_events(path)] == ["xxxxxx", "second"]
    path.write_text('{"t": 1.0, "ki')
    log_at(path).close()
    assert path.read_text() == ""


def test_damage_before_the_end_is_reported_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    path.write_text('{"t": 1, "kind": "warning", "text": "a"}\nnonsense\n{"t": 2, "kind": "warning", "text": "b"}\n')
    with pytest.raises(RunDirectoryError, match="line 2"):
        list(read_events(path))
    with pytest.raises(RunDirectoryError, match="missing"):
        list(read_events(tmp_path / "missing"))


def test_kinds_are_picked_whatever_the_order_of_keys(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    with log_at(path) as log:
        log.write("step", step=1)
        log.write("warning", text='"kind": "step"')
    with path.open("a") as file:
        file.write('{"kind": "step", "t": 3, "step": 2}\n{"kind": "stop", "t": 3, "step": 2}\n')
    assert [event.get("step") for event in read_events(path, {"step"})] == [1, 2]
    assert [event["kind"] for event in read_events(path, {"warning", "stop"})] == ["warning", "stop"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_loses_nothing_that_fits_in_memory_and_raises_nothing(tmp_path: Path) -> None:
    path = tmp_path / "events.jsonl"
    log = log_at(path)
    full, real = os.open("/dev/full", os.O_WRONLY), os.dup(log._fd)
    os.dup2(full, log._fd)  # the disk fills up
    log.write("warning", text="kept")
    for step in range(20):
        log.write("step", step=step)
    assert path.read_text() == ""
    os.dup2(real, log._fd)  # and has room again
    log.close()
    os.close(full)
    os.close(real)
    assert [event["kind"] for event in read_events(path)] == ["warning"] + ["step"] * 20


def test_a_directory_that_cannot_be_written_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(RunDirectoryError, match="--run"):
        EventLog(tmp_path / "missing" / "events.jsonl")


def test_the_page_and_the_code_name_the_same_kinds_and_fields() -> None:
    page = (ROOT / "docs" / "events.md").read_text()
    documented = {}
    for section in page.split("\n### ")[1:]:
        kind = re.match(r"`(\w+)`\n", section)
        assert kind, section[:40]
        documented[kind[1]] = tuple(re.findall(r"^\| `(\w+)` \| \S", section, flags=re.MULTILINE))
    assert documented == dict(KINDS)
