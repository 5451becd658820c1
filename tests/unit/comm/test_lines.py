"""Sums of single lines, compiled and with torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from shoal.comm import lines

LINES = 1500


@pytest.fixture(params=["compiled", "torch"])
def kind(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> lines.Lines:
    if request.param == "torch":
        monkeypatch.setattr(lines.native, "load", object)
    lines.load.cache_clear()
    found = lines.load()
    lines.load.cache_clear()
    if type(found).__name__ != {"compiled": "_Compiled", "torch": "_Torch"}[request.param]:
        pytest.skip("no C compiler here")
    return found


def stripes(n: int, dtype: torch.dtype, full: int) -> list[torch.Tensor]:
    """Each with values in ``full`` lines, one of them in its last element only, and -0.0 in line 7 of the first."""
    random = torch.Generator().manual_seed(n)
    width = lines.LINE_BYTES // dtype.itemsize
    made = []
    for _ in range(n):
        rows = torch.zeros(LINES, width, dtype=dtype)
        chosen = torch.randperm(LINES, generator=random)[:full]
        rows[chosen] = torch.randn(full, width, generator=random).to(dtype)
        rows[11, -1] = 1.0
        made.append(rows)
    made[0][7, 3] = -0.0
    return [rows.view(-1) for rows in made]


@pytest.mark.parametrize("n", [1, 3])
def test_marks_change_nothing_but_say_where_not_to_look(kind: lines.Lines, n: int) -> None:
    sources = stripes(n, torch.float32, 90)
    width = lines.LINE_BYTES // 4
    ends = np.array([5, 700, 701, 1203, LINES])
    # Some marked lines hold nothing, and in pieces that are not known no mark means anything.
    marks = [(source.view(LINES, width).view(torch.int32) != 0).any(1).to(torch.uint8) for source in sources]
    marks[0][[6, 650, 1300]] = 1
    known = np.array([1, 1, 0, 1, 0], np.uint8)
    for own in marks:
        own[700:701] = own[1203:] = 0
    out, found = [torch.zeros_like(sources[0]) for _ in range(2)], torch.full((2, LINES), -1)
    count = kind.sum_into(out[0], sources, 0.3, found[0], LINES // 2)
    assert kind.sum_into(out[1], sources, 0.3, found[1], LINES // 2, lines.Marks(marks, ends, known)) == count
    assert torch.equal(found[0][:count], found[1][:count]) and torch.equal(out[0], out[1])
    assert kind.sum_into(out[1], sources, 0.3, found[1], count - 1, lines.Marks(marks, ends, known)) == -1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 2, 5])
def test_the_lines_that_hold_anything_are_found_and_summed_as_all_would_be(
    kind: lines.Lines, n: int, dtype: torch.dtype
) -> None:
    sources = stripes(n, dtype, 40)
    whole = sources[0]
    for source in sources[1:]:
        whole = whole + source
    whole = (whole * 0.3).view(LINES, -1)
    out, found = torch.full_like(sources[0], 9.0), torch.full((LINES,), -1)
    count = kind.sum_into(out, sources, 0.3, found, LINES // 2)
    bits = torch.stack([s.view(torch.uint8).view(LINES, -1) for s in sources])
    expected = (bits != 0).any(2).any(0).nonzero().view(-1)
    assert {7, 11} <= set(expected.tolist())
    assert torch.equal(found[:count], expected)
    summed = out.view(LINES, -1)[:count]
    assert torch.equal(summed.reshape(-1).view(torch.uint8), whole[expected].reshape(-1).view(torch.uint8))
    assert (out.view(LINES, -1)[count:] == 9.0).all()


def test_lines_that_are_too_many_are_left_alone(kind: lines.Lines) -> None:
    few, many = stripes(2, torch.float32, 40), stripes(2, torch.float32, LINES)
    out, found = torch.empty(LINES * 16), torch.empty(LINES, dtype=torch.int64)
    count = kind.sum_into(out, few, 1.0, found, LINES)
    assert kind.sum_into(out, few, 1.0, found, count) == count
    assert kind.sum_into(out, few, 1.0, found, count - 1) == -1
    # The first look at a few of them says so.
    assert kind.sum_into(out, many, 1.0, found, LINES) == -1


def test_lines_come_back_to_where_they_were(kind: lines.Lines) -> None:
    whole = torch.arange(LINES * 16, dtype=torch.int32).view(torch.uint8)
    numbers = torch.tensor([3, 4, 900, LINES - 1])
    row = torch.empty(len(numbers) * lines.LINE_BYTES, dtype=torch.uint8)
    kind.take(row, whole, numbers)
    assert row.view(torch.int32).view(-1, 16)[:, 0].tolist() == [n * 16 for n in numbers.tolist()]
    changed = whole.clone()
    changed.view(LINES, -1)[numbers] = 1
    kind.put(changed, row, numbers)
    assert torch.equal(changed, whole)
