"""The write-ahead log: what was committed is read back whatever became of the end of it."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from pathlib import Path

import pytest

from shoal.ps.log import Kind, LogWriter, Push, TornError, newest, prune, read, segments, whole


def write(writer: LogWriter, number: int, mark: int = 0, cut: bool = False, size: int = 40) -> None:
    writer.begin(number, mark, cut)
    body = bytes([number % 256]) * size
    writer.add(Kind.BYTES, [(64, (body[:8], body[8:])), (1000 + number, (body,))])
    writer.add(Kind.ROWS, [(3, (b"rows",))])
    writer.commit(b"notes of %d" % number)


def contents(push: Push) -> list[tuple[int, int, bytes]]:
    return [(frame.kind, frame.where, bytes(frame.read())) for frame in push.frames]


@pytest.fixture
def small(tmp_path: Path) -> Iterator[tuple[Path, LogWriter]]:
    writer = LogWriter(tmp_path, "server-0", segment_bytes=600)
    yield tmp_path, writer
    writer.close()


def test_pushes_are_read_back_and_told_when_they_are_on_disk(tmp_path: Path) -> None:
    told: list[int] = []
    writer = LogWriter(tmp_path / "log", "server-1", told.append, segment_bytes=600)
    for number in range(5, 15):
        write(writer, number)
    assert writer.wait(14, 60.0)
    writer.close()
    assert told == sorted(told) and told[-1] == 14
    found = read(tmp_path / "log", "server-1")
    assert [push.number for push in found] == list(range(5, 15)) and len(segments(tmp_path / "log", "server-1")) > 2
    assert found[3].notes == b"notes of 8"
    body = bytes([8]) * 40
    assert contents(found[3]) == [(Kind.BYTES, 64, body), (Kind.BYTES, 1008, body), (Kind.ROWS, 3, b"rows")]
    assert read(tmp_path / "log", "server-0") == []


def test_whatever_is_torn_off_only_what_is_whole_is_read_and_a_successor_goes_on(tmp_path: Path) -> None:
    writer = LogWriter(tmp_path, "a")
    ends = []
    for number in range(3):
        write(writer, number)
        ends.append(segments(tmp_path, "a")[0].path.stat().st_size)
    writer.close()
    path = segments(tmp_path, "a")[0].path
    whole = path.read_bytes()
    for size in [*range(0, len(whole), 13), *(end + by for end in ends for by in (-1, 0, 1))]:
        path.write_bytes(whole[:size])
        assert len(read(tmp_path, "a")) == sum(end <= size for end in ends)
    # A page of the middle that never came to the disk: nothing behind it counts.
    path.write_bytes(whole[: ends[0] + 4] + bytes(8) + whole[ends[0] + 12 :])
    assert [push.number for push in read(tmp_path, "a")] == [0]
    successor = LogWriter(tmp_path, "a")
    assert successor.last == 0 and path.stat().st_size == ends[0]
    write(successor, 1)
    assert successor.wait(1, 60.0)
    successor.close()
    assert [push.number for push in read(tmp_path, "a")] == [0, 1]


def test_a_segment_without_a_whole_push_is_begun_anew(tmp_path: Path) -> None:
    writer = LogWriter(tmp_path, "a", segment_bytes=100)
    write(writer, 0)
    writer.begin(1, 0)
    writer.add(Kind.BYTES, [(0, (b"x" * 50,))])
    writer.close()
    assert len(segments(tmp_path, "a")) == 2
    successor = LogWriter(tmp_path, "a", segment_bytes=100)
    assert successor.last == 0
    write(successor, 1)
    write(successor, 2)
    successor.close()
    assert [push.number for push in read(tmp_path, "a")] == [0, 1, 2]


def test_segments_go_when_a_checkpoint_holds_all_of_them(small: tuple[Path, LogWriter]) -> None:
    directory, writer = small
    for number in range(12):
        write(writer, number, mark=number // 4 * 10, cut=number % 4 == 0)
    assert prune(directory, "server-0", 0) == 0
    assert prune(directory, "server-0", 10) > 0
    assert [push.number for push in read(directory, "server-0", 10)] == list(range(4, 12))
    prune(directory, "server-0", 100)
    left = read(directory, "server-0")
    assert left and left[-1].number == 11 and left[0].number >= 8


def test_a_disk_that_is_full_takes_nothing_from_what_was_written(tmp_path: Path) -> None:
    writer = LogWriter(tmp_path, "a", limit_bytes=1000)
    write(writer, 0)
    write(writer, 1)
    assert writer.wait(1, 60.0)
    size = segments(tmp_path, "a")[0].path.stat().st_size
    with pytest.raises(OSError) as caught:
        write(writer, 2, size=5000)
    assert caught.value.errno == errno.ENOSPC and segments(tmp_path, "a")[0].path.stat().st_size == size
    writer.close()
    assert [push.number for push in read(tmp_path, "a")] == [0, 1]


def test_of_each_place_the_newest_is_kept_in_the_order_of_writing(small: tuple[Path, LogWriter]) -> None:
    directory, writer = small
    for number in range(3):
        write(writer, number)
    found = newest(frame for push in read(directory, "server-0") for frame in push.frames)
    assert [(f.kind, f.where) for f in found] == [
        (Kind.BYTES, 1000), (Kind.ROWS, 3), (Kind.BYTES, 1001), (Kind.ROWS, 3),
        (Kind.BYTES, 64), (Kind.BYTES, 1002), (Kind.ROWS, 3),
    ]  # fmt: skip
    assert bytes(found[4].read()) == bytes([2]) * 40


def test_numbers_in_a_log_lie_where_they_can_be_used_and_what_is_torn_is_told_before_it_is_given(tmp_path: Path) -> None:
    writer = LogWriter(tmp_path, "a", segment_bytes=600)
    for number in range(40):
        write(writer, number, size=number)
    writer.close()
    found = read(tmp_path, "a")
    assert [push.number for push in whole(found)] == list(range(40))
    assert {frame.at % 16 for push in found for frame in push.frames} == {0}
    torn = found[25].frames[1]
    data = bytearray(torn.segment.path.read_bytes())
    data[torn.at] ^= 1
    torn.segment.path.write_bytes(data)
    given, pushes = list[int](), whole(read(tmp_path, "a"))
    with pytest.raises(TornError):
        for push in pushes:
            given.append(push.number)
    assert given == list(range(25))
