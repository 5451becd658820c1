"""What a command hands back, and how it gets to standard output."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TextIO

from shoal.observe.events import to_json


@dataclass(frozen=True)
class Answer:
    """A command's result.

    Attributes:
        result: the one JSON object that ``--json`` prints.
        text: the lines that a person gets instead; none where the command has shown all while it ran.
        then: what the command goes on with once its answer is out: a service says where it is and then serves.
    """

    result: Mapping[str, Any]
    text: Sequence[str] = field(default=())
    then: Callable[[], None] | None = None


@contextlib.contextmanager
def standard_output(json: bool) -> Iterator[TextIO]:
    """Yield where the answer goes.

    With ``json`` the file descriptor 1 itself points to standard error meanwhile, so that nothing that user code, a
    library or a child process prints can get between a script and its JSON object.
    """
    if not json:
        yield sys.stdout
        return
    sys.stdout.flush()
    shown, kept = sys.stdout, os.dup(1)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    try:
        with open(os.dup(kept), "w", encoding="utf-8") as stream:
            yield stream
    finally:
        sys.stdout = shown
        os.dup2(kept, 1)
        os.close(kept)


def write(answer: Answer, stream: TextIO, json: bool) -> None:
    """Print an answer; a reader that has gone away (``shoal runs | head``) is no error."""
    lines = [to_json(answer.result)] if json else answer.text
    try:
        for line in lines:
            stream.write(line + "\n")
        stream.flush()
    except BrokenPipeError:
        # Python would complain once more when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def table(rows: Iterable[Sequence[Any]], header: Sequence[str] = ()) -> list[str]:
    """Return rows as lines with aligned columns; numbers to the right."""
    cells = [[str(cell) for cell in row] for row in ([header] if header else [])]
    given = [list(row) for row in rows]
    cells += [[str(cell) for cell in row] for row in given]
    if not given:
        return []
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))]
    right = [all(isinstance(row[i], (int, float)) for row in given) for i in range(len(widths))]
    return [
        "  ".join(
            cell.rjust(width) if numeric else cell.ljust(width)
            for cell, width, numeric in zip(row, widths, right, strict=True)
        ).rstrip()
        for row in cells
    ]
