"""``shoal predict``: answer a whole data set with a finished model."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from shoal.cli.answer import Answer, standard_output
from shoal.cli.options import JsonFlag, at_least_one
from shoal.observe.lines import rate

if TYPE_CHECKING:
    from shoal.serve.predict import Prediction, Progress, Sink, Summary
    from shoal.serve.tables.answers import Answers, JsonLines

_Bundle = Annotated[
    str, typer.Argument(metavar="BUNDLE", help="A run directory, a bundle, or a job's name for its latest run.")
]
_Data = Annotated[
    str,
    typer.Argument(
        metavar="DATA",
        help="A .csv, .jsonl, .txt, .npy, .npz, .safetensors or .pt file, a folder of pictures, or cifar10.",
    ),
]
_Out = Annotated[
    Path | None,
    typer.Option("--out", metavar="FILE", help="A .jsonl, .csv, .npz or .safetensors file; left out: JSON lines here."),
]
_Replicas = Annotated[int | None, typer.Option("--replicas", metavar="N", help="Processes; left out: measures.")]
_BatchSize = Annotated[
    int | None, typer.Option("--batch-size", metavar="N", help="Rows in a batch; left out: measures.")
]
_Limit = Annotated[int | None, typer.Option("--limit", metavar="N", help="Answer the first N rows alone.")]
_Fresh = Annotated[bool, typer.Option("--fresh", help="Begin again, also where FILE was begun or exists.")]


def predict(
    bundle: _Bundle, data: _Data, out: _Out = None, replicas: _Replicas = None, batch_size: _BatchSize = None,
    limit: _Limit = None, fresh: _Fresh = False, json: JsonFlag = False,
) -> Answer:  # fmt: skip
    """Answer a whole data set with a finished model.

    Each row is answered once, in order, by all cores. Interrupted or killed, the same command goes on where it was.
    """
    for option, value in (("--replicas", replicas), ("--batch-size", batch_size), ("--limit", limit)):
        at_least_one(option, value)
    from shoal.serve.predict import Filed, Prediction, PredictOptions

    options = PredictOptions(replicas=replicas, batch_size=batch_size, limit=limit, fresh=fresh)
    with contextlib.closing(Prediction(bundle, data, out, options, _say)) as prediction:
        if prediction.part is None:
            return _to_standard_output(prediction, json)
        part, form = prediction.part, prediction.format
        result: dict[str, Any] = {"out": str(part.out), "answered_before": prediction.answered_before}
        if part.finished_before:
            rows = part.note.rows
            return Answer(
                {"rows": rows, "new": 0, "samples_per_s": None, **result},
                [f"{part.out} has the answers to all {rows:,} rows already; --fresh makes them again."],
            )
        if prediction.answered_before:
            _say(f"Going on behind row {prediction.answered_before:,}.")
        try:
            summary = _run(prediction, Filed(part, form))
        except BaseException:
            if part.note.rows:
                _say(f"{part.note.rows:,} rows are safe in {part.path}; the same command goes on behind them.")
            raise
        part.finish(form)
    return Answer({**_described(summary), **result}, [_sentence(summary), f"answers: {part.out}"])


def _to_standard_output(prediction: Prediction, json: bool) -> Answer:
    """Answers as JSON lines while they come; with ``--json`` within the one object at the end."""
    from shoal.serve.tables.answers import JsonLines

    lines = JsonLines(prediction.signature)
    if json:
        collected = _Collected(lines)
        summary = _run(prediction, collected)
        return Answer({**_described(summary), "out": None, "answers": collected.rows})
    # The model may print: only answers may get to standard output.
    with standard_output(json=True) as stream, _quiet_when_nobody_reads(stream):
        summary = _run(prediction, _Printed(lines, stream))
        _say(_sentence(summary))
    return Answer({})


def _run(prediction: Prediction, sink: Sink) -> Summary:
    from shoal.observe.predict_view import PredictView

    with PredictView() as view:

        def watch(progress: Progress) -> None:
            view.show(progress.rows, progress.total, progress.fraction, progress.rows_per_s, progress.left_s)

        return prediction.run(sink, watch)


class _Collected:
    """Keeps the answers as JSON objects."""

    def __init__(self, lines: JsonLines) -> None:
        self._lines = lines
        self.rows: list[dict[str, Any]] = []

    def put(self, answers: Answers, mark: str | None) -> None:
        self.rows += self._lines.objects(answers)

    def settle(self) -> None:
        return


class _Printed:
    """Prints the answers as they come."""

    def __init__(self, lines: JsonLines, stream: TextIO) -> None:
        self._lines = lines
        self._stream = stream

    def put(self, answers: Answers, mark: str | None) -> None:
        self._stream.write(self._lines.encode(answers).decode())
        self._stream.flush()

    def settle(self) -> None:
        return


@contextlib.contextmanager
def _quiet_when_nobody_reads(stream: TextIO) -> Iterator[None]:
    """A reader that has gone away (``shoal predict … | head``) ends it, and is no error."""
    try:
        yield
    except BrokenPipeError:
        # Python would complain once more when it flushes at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _described(summary: Summary) -> dict[str, Any]:
    return {
        "rows": summary.rows, "new": summary.new, "samples_per_s": summary.samples_per_s,
        "batch_size": summary.batch_size, "replicas": summary.replicas, "replica_deaths": summary.replica_deaths,
        "why": summary.why,
    }  # fmt: skip


def _sentence(summary: Summary) -> str:
    before = f" ({summary.rows - summary.new:,} of them before)" if summary.new < summary.rows else ""
    return (
        f"{summary.rows:,} rows{before}, {rate(summary.samples_per_s)} rows/s in batches of up to {summary.batch_size} "
        f"({summary.why})"
    )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
