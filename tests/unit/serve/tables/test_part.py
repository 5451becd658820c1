"""A file of answers survives whatever ends its writer, at any moment."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from shoal.errors import JobFailed, RequestError
from shoal.serve.signature import ModelSignature, TensorSignature
from shoal.serve.tables.answers import format_of
from shoal.serve.tables.part import PartFile

ORIGIN = {"another model": "m", "another --limit": "None"}
NET = ModelSignature("net", (), (TensorSignature("y", "FP32", (-1,)),))
LINES = format_of(".jsonl", NET, False)


def _note(out: Path) -> Path:
    return out.with_name(f".{out.name}.predict.json")


def _begun(out: Path) -> None:
    """Two rows that are noted, one and a half that are not."""
    part = PartFile(out, ORIGIN, fresh=False)
    part.append(b"1\n2\n", 2, "mark of two")
    part.commit()
    part.append(b"3\n4", 2, "mark of four")
    part._file.flush()
    part.close()


def test_what_is_not_noted_is_cut_off(tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    _begun(out)
    part = PartFile(out, ORIGIN, fresh=False)
    assert (part.note.rows, part.note.mark, part.path.read_bytes()) == (2, "mark of two", b"1\n2\n")
    part.append(b"3\n", 1, "mark of three")
    part.finish(LINES)
    assert out.read_bytes() == b"1\n2\n3\n" and sorted(tmp_path.iterdir()) == sorted([out, _note(out)])


def test_a_finished_file_is_known_again_and_not_overwritten(tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    _begun(out)
    PartFile(out, ORIGIN, fresh=False).finish(LINES)
    again = PartFile(out, ORIGIN, fresh=False)
    assert again.finished_before and again.note.rows == 2
    assert "other data" in str(again.mismatch("other data"))
    again.close()
    with pytest.raises(RequestError, match="exists already; give --fresh"):
        PartFile(out, {**ORIGIN, "another model": "n"}, fresh=False)
    out.write_bytes(b"mine")
    with pytest.raises(RequestError, match="exists already; give --fresh"):
        PartFile(out, ORIGIN, fresh=False)
    _note(out).unlink()
    with pytest.raises(RequestError, match="exists already; give --fresh"):
        PartFile(out, ORIGIN, fresh=False)
    fresh = PartFile(out, ORIGIN, fresh=True)
    assert fresh.note.rows == 0 and out.read_bytes() == b"mine"
    fresh.append(b"1\n", 1, "one")
    fresh.finish(LINES)
    assert out.read_bytes() == b"1\n"


def test_a_writer_killed_between_any_two_steps_of_the_end_loses_nothing(tmp_path: Path) -> None:
    out = tmp_path / "a.npz"
    form = format_of(".npz", NET, False)
    part = PartFile(out, ORIGIN, fresh=False)
    part.append(b"\0\0\x80?" * 3, 3, "three")
    part.commit()
    whole = form.assemble(part.path, 3)
    part.close()
    # Killed before the rename: made again of the part. Killed behind it: again, for the part is still there.
    for killed in (lambda: None, lambda: os.replace(whole, out)):
        killed()
        again = PartFile(out, ORIGIN, fresh=False)
        assert not again.finished_before and again.note.rows == 3
        again.close()
    last = PartFile(out, ORIGIN, fresh=False)
    last.finish(form)
    assert sorted(tmp_path.iterdir()) == sorted([out, _note(out)])
    assert PartFile(out, ORIGIN, fresh=False).finished_before


def test_what_was_begun_with_something_else_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "a.jsonl"
    _begun(out)
    before = (tmp_path / "a.jsonl.part").read_bytes()
    with pytest.raises(RequestError, match="a.jsonl.part was begun with another model; give --fresh"):
        PartFile(out, {**ORIGIN, "another model": "n"}, fresh=False)
    with pytest.raises(RequestError, match="another --limit"):
        PartFile(out, {**ORIGIN, "another --limit": "3"}, fresh=False)
    assert (tmp_path / "a.jsonl.part").read_bytes() == before
    _note(out).write_text("{")
    with pytest.raises(RequestError, match="Nothing says how far"):
        PartFile(out, ORIGIN, fresh=False)
    fresh = PartFile(out, {**ORIGIN, "another --limit": "3"}, fresh=True)
    assert fresh.is_empty and (tmp_path / "a.jsonl.part").read_bytes() == b""
    fresh.close()


def test_two_do_not_write_one_file(tmp_path: Path) -> None:
    first = PartFile(tmp_path / "a.jsonl", ORIGIN, fresh=False)
    for fresh in (False, True):
        with pytest.raises(RequestError, match="Another process is writing"):
            PartFile(tmp_path / "a.jsonl", ORIGIN, fresh=fresh)
    first.close()
    PartFile(tmp_path / "a.jsonl", ORIGIN, fresh=False).close()


def test_a_place_that_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="There is no directory"):
        PartFile(tmp_path / "none" / "a.jsonl", ORIGIN, fresh=False)
    with pytest.raises(RequestError, match="is no plain file"):
        PartFile(tmp_path, ORIGIN, fresh=False)
    full = PartFile(tmp_path / "a.jsonl", ORIGIN, fresh=False)
    full._file.close()
    full._file = open("/dev/full", "r+b", buffering=0)  # noqa: SIM115
    with pytest.raises(JobFailed, match="cannot be written .No space left on device.; make room"):
        full.append(b"1\n", 1, "one")
    full.close()
