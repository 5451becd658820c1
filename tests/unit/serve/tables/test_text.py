"""CSV and JSON lines become rows; what is wrong is named with file and row."""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from shoal.errors import DataError
from shoal.serve.signature import TensorSignature
from shoal.serve.tables.rows import Rows
from shoal.serve.tables.text import CsvRows, JsonRows, LineRows, TextList

GRID = TensorSignature("grid", "FP32", (-1, 2, 2))
COUNT = TensorSignature("count", "INT64", (-1,))
FLAG = TensorSignature("flag", "BOOL", (-1, 1))
PICTURE = TensorSignature("pixels", "UINT8", (-1, 3, 2, 4))


def _write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def _all(rows: Rows, most: int = 2) -> list[np.ndarray]:
    parts = []
    while (read := rows.read(most)) is not None:
        assert all(len(column) <= most for column in read)
        parts.append(read)
    rows.close()
    return [np.concatenate(column) for column in zip(*parts, strict=True)]


def test_csv_columns_by_element_by_name_and_as_json(tmp_path: Path) -> None:
    text = (
        "\ufeffid,grid_0,grid_1,grid_2,grid_3,count,flag_0\n7,0.5,1,-2e3,nan,9007199254740993,true\n\n8,1,2,3,4,2.0,0\n"
    )
    grid, count, flag = _all(CsvRows(_write(tmp_path / "a.csv", text), [GRID, COUNT, FLAG]))
    np.testing.assert_array_equal(grid, np.array([[[0.5, 1], [-2000, np.nan]], [[1, 2], [3, 4]]], "f4"))
    assert count.tolist() == [9007199254740993, 2] and count.dtype == np.int64
    assert flag.tolist() == [[True], [False]]
    lists = 'grid,count\n"[[1,2],[3,4]]",5\n"[1,2,3,4]",[6]\n'
    grid, count = _all(CsvRows(_write(tmp_path / "b.csv", lists), [GRID, COUNT]))
    assert (grid[0] == grid[1]).all() and grid.shape == (2, 2, 2) and count.tolist() == [5, 6]


def test_csv_with_pictures_as_paths_and_base64(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 4, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    coded = base64.b64encode((tmp_path / "a.png").read_bytes()).decode()
    (found,) = _all(CsvRows(_write(tmp_path / "a.csv", f"image,label\na.png,1\n{coded},2\n"), [PICTURE]))
    assert (found == pixels.transpose(2, 0, 1)).all() and found.shape == (2, 3, 2, 4)


def test_cells_may_be_longer_than_python_allows_by_itself(tmp_path: Path) -> None:
    wide = TensorSignature("x", "FP32", (-1, 50_000))
    file = tmp_path / "a.csv"
    with file.open("w") as stream:
        csv.writer(stream).writerows([["x"], [json.dumps([0.25] * 50_000)]])
    before = csv.field_size_limit()
    assert _all(CsvRows(file, [wide]))[0].shape == (1, 50_000)
    assert csv.field_size_limit() == before


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no header"),
        ("a,b\n1,2\n", 'no column for the input grid; give columns "grid_0" to "grid_3", or one column "grid"'),
        ("grid_0,grid_1,grid_2,count\n1,2,3,4\n", 'no column "grid_3"'),
        ("grid_0,grid_1,grid_2,grid_3,count,count\n1,2,3,4,5,6\n", 'two columns "count"'),
        ("grid_0,grid_1,grid_2,grid_3,count\n1,2,3,4\n", "row 2: it has 4 cells where the header has 5"),
        ("grid_0,grid_1,grid_2,grid_3,count\n1,2,3,4,5\n1,2,?,4,5\n", r'row 3: grid_2 is "\?", which is no number'),
        ("grid_0,grid_1,grid_2,grid_3,count\n1,2,3,4,5.5\n", "row 2: count has a fraction"),
        ("grid_0,grid_1,grid_2,grid_3,count\n1,2,3,1e39,5\n", "row 2: grid has a number beyond what FP32 holds"),
        ('grid,count\n"[1,2,3]",5\n', r"row 2: grid has the shape \[3\] where the model takes \[2, 2\]"),
        ('grid,count\n"[[1,2],[3]]",5\n', "row 2: grid has lists of unequal lengths"),
        ("grid,count\nhello,5\n", 'row 2: grid is "hello", which is no JSON list'),
        ('grid,count\n"[1,2,3,4]" x,5\n', "row 2: it cannot be read as CSV"),
    ],
)
def test_csv_that_makes_no_sense(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(DataError, match=message) as caught:
        _all(CsvRows(_write(tmp_path / "a.csv", text), [GRID, COUNT]))
    assert str(caught.value).startswith("a.csv")


def test_json_lines_by_name_and_bare(tmp_path: Path) -> None:
    text = '{"count": 3, "grid": [[1, 2.5], [3, 4]], "id": "a"}\n\n{"grid": [1, 2, 3, 4], "count": 4}'
    grid, count = _all(JsonRows(_write(tmp_path / "a.jsonl", text), [GRID, COUNT]))
    assert grid.tolist() == [[[1, 2.5], [3, 4]], [[1, 2], [3, 4]]] and count.tolist() == [3, 4]
    assert _all(JsonRows(_write(tmp_path / "b.jsonl", "3\n4\n"), [COUNT]))[0].tolist() == [3, 4]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"grid": [1, 2, 3, 4]', "line 2: it is not valid JSON"),
        ('{"grid": [1, 2, 3, 4], "cuont": 1}', 'line 2: there is no input "count". Did you mean "cuont"'),
        ("[1, 2, 3, 4]", "line 2: it is no object; the model takes grid, count by name"),
        ('{"grid": [1, 2, null, 4], "count": 1}', "line 2: grid does not hold numbers"),
        ('{"grid": [1, 2, 3, 4], "count": "1"}', "line 2: count does not hold numbers"),
        ('{"grid": [1, 2, 3, 4], "count": 1e30}', "line 2: count has a number outside"),
        ("[" * 100_000, "line 2: it is not valid JSON"),
    ],
)
def test_json_lines_that_make_no_sense(tmp_path: Path, line: str, message: str) -> None:
    good = '{"grid": [1, 2, 3, 4], "count": 1}\n'
    rows = JsonRows(_write(tmp_path / "a.jsonl", good + line + "\n"), [GRID, COUNT])
    first = rows.read(5)
    assert first is not None and len(first[0]) == 1 and rows.at == 1
    for _ in range(2):
        with pytest.raises(DataError, match=message):
            rows.read(5)
    rows.close()


def test_text_that_is_no_utf8_is_said_so(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"3\n\xff\xfe\n")
    rows = JsonRows(tmp_path / "a.jsonl", [COUNT])
    assert rows.read(1) is not None
    with pytest.raises(DataError, match="not UTF-8"):
        rows.read(1)
    rows.close()


def _csv_text(rows: Sequence[int]) -> str:
    text = io.StringIO()
    csv.writer(text).writerows([["note", "count"], *(["two\nlines", row] for row in rows)])
    return text.getvalue()


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_the_mark_is_of_what_was_passed_however_it_was_passed(tmp_path: Path, kind: str) -> None:
    def rows(text: str) -> Rows:
        path = _write(tmp_path / f"a.{kind}", text)
        return CsvRows(path, [COUNT]) if kind == "csv" else JsonRows(path, [COUNT])

    def write(values: Sequence[int]) -> str:
        return _csv_text(values) if kind == "csv" else "\n\n".join(map(str, values))

    marks = []
    read = rows(write(range(8)))
    for _ in range(4):
        assert read.read(2) is not None
        marks.append(read.mark)
    assert read.fraction == 1.0 and read.read(2) is None and read.mark == marks[-1]
    read.close()
    assert len(set(marks)) == 4
    # Skipped, with more behind it and blank lines at the end: the same rows. Another third row: others.
    for text, same in (
        (write(range(8)), True), (write(range(12)) + "\n\n", True), (write([0, 1, 7, 3, 4, 5]), False),
    ):  # fmt: skip
        again = rows(text)
        again.skip(6)
        assert again.at == 6 and (again.mark == marks[2]) is same
        again.close()
    short = rows(write(range(3)))
    short.skip(6)
    assert short.at == 3
    short.close()


IDS = TensorSignature("ids", "INT64", (-1, -1), longest=4, padding=9)
MASK = TensorSignature("mask", "INT64", (-1, -1), longest=4, absent=1)


def _encode(text: str) -> tuple[np.ndarray, ...]:
    ids = np.array([len(word) for word in text.split()])
    return ids, np.ones_like(ids)


def _padded(rows: Rows) -> tuple[list[Any], list[Any], list[int]]:
    read = rows.read(5)
    lengths = rows.lengths()
    rows.close()
    assert read is not None and lengths is not None and read[0].dtype == np.int64
    return read[0].tolist(), read[1].tolist(), lengths.tolist()


def test_rows_of_unequal_lengths_are_padded(tmp_path: Path) -> None:
    lines = '{"ids": [1, 2, 3]}\n{"ids": [4], "mask": [0]}\n'
    expected = ([[1, 2, 3], [4, 9, 9]], [[1, 1, 1], [0, 0, 0]], [3, 1])
    assert _padded(JsonRows(_write(tmp_path / "a.jsonl", lines), [IDS, MASK])) == expected
    table = 'ids,mask\n"[1,2,3]","[1,1,1]"\n[4],[0]\n'
    assert _padded(CsvRows(_write(tmp_path / "a.csv", table), [IDS, MASK])) == expected
    for line, message in (
        ('{"ids": [1, 2], "mask": [1]}', r"line 1: its inputs have unequal lengths \(1, 2\)"),
        ('{"ids": [1, 2, 3, 4, 5]}', "line 1: ids is 5 long, and the model takes 1 to 4"),
        ('{"ids": []}', "line 1: ids is 0 long"),
        ('{"ids": [[1]]}', r"line 1: ids has the shape \[1, 1\]"),
        ('{"mask": [1]}', 'line 1: there is no input "ids"'),
    ):
        with pytest.raises(DataError, match=message):
            JsonRows(_write(tmp_path / "b.jsonl", line), [IDS, MASK]).read(1)


@pytest.mark.parametrize("kind", ["txt", "csv", "jsonl", "list"])
def test_texts(tmp_path: Path, kind: str) -> None:
    def rows(texts: list[str]) -> Rows:
        path, specs = tmp_path / f"{'-'.join(texts)}.{kind}", [IDS, MASK]
        if kind == "list":
            return TextList(texts, specs, _encode)
        if kind == "txt":
            return LineRows(_write(path, "\n\n".join(texts)), specs, _encode)
        if kind == "csv":
            return CsvRows(_write(path, "\n".join(["text", *texts])), specs, _encode)
        lines = [json.dumps({"text": text}) for text in texts[:-1]] + [json.dumps(texts[-1])]
        return JsonRows(_write(path, "\n".join(lines)), specs, _encode)

    assert _padded(rows(["a bb", "ccc"])) == ([[1, 2], [3, 9]], [[1, 1], [1, 0]], [2, 1])
    one, other = rows(["a", "b", "c", "x"]), rows(["a", "b", "d", "x"])
    for row in (one, other):
        row.skip(2)
    assert one.mark == other.mark and one.at == 2
    assert one.read(1) is not None and other.read(1) is not None
    assert one.mark != other.mark
    one.close()
    other.close()


def test_texts_where_there_are_none(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is text, and the model takes count as numbers"):
        LineRows(_write(tmp_path / "a.txt", "1\n"), [COUNT])
    with pytest.raises(DataError, match="row 2 of data: the text is empty"):
        rows = TextList(["a", " "], [IDS, MASK], _encode)
        assert rows.read(2) is not None
        rows.read(1)
    for line in ('{"text": 3}', '" "'):
        with pytest.raises(DataError, match="line 1: the text is empty, or none"):
            JsonRows(_write(tmp_path / "a.jsonl", line), [IDS, MASK], _encode).read(1)
