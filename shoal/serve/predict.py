"""Offline inference: a whole data set through the replicas of a model, each row answered once, in order."""

from __future__ import annotations

import hashlib
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from shoal.cluster.local import find_cores
from shoal.errors import RequestError
from shoal.serve.crew import Crew
from shoal.serve.latency import LatencyModel
from shoal.serve.offline import Conveyor, Pace, Window
from shoal.serve.service import locate
from shoal.serve.signature import ModelSignature
from shoal.serve.slots import SlotLayout
from shoal.serve.source import ModelSource, can_be_served, describe
from shoal.serve.tables.answers import Answers, Format, format_of, suffix_of, trimmed
from shoal.serve.tables.opened import open_rows
from shoal.serve.tables.part import PartFile
from shoal.serve.tables.rows import Rows, floats
from shoal.serve.tables.text import Encode

_TELL_EVERY_S = 0.1
# A replica that has had the same batch for 30 s is taken for hung; a batch must be well below that.
_LONGEST_BATCH_S = 10.0
_WINDOW = 128


@dataclass(frozen=True, kw_only=True)
class PredictOptions:
    """How to answer a data set.

    Attributes:
        replicas: processes that compute; None to find out by measurement.
        batch_size: rows in a batch; None to find out by measurement.
        limit: how many rows to answer, from the first; None for all.
        fresh: begin again where a file of answers was begun, or exists.
    """

    replicas: int | None = None
    batch_size: int | None = None
    limit: int | None = None
    fresh: bool = False

    def check(self) -> None:
        """RequestError where a value makes no sense."""
        named = (("replicas", self.replicas), ("rows in a batch", self.batch_size), ("rows as the limit", self.limit))
        for what, value in named:
            if value is not None and value < 1:
                raise RequestError(f"{value} {what} cannot answer anything; give at least 1.")


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far it is: ``rows`` are answered, ``new`` of them by this process, within ``elapsed_s``.

    ``fraction`` is of the whole data, ``began_at`` what it was when this process began; None, as ``total``, where nobody knows.
    """

    rows: int
    new: int
    elapsed_s: float
    total: int | None
    fraction: float | None
    began_at: float

    @property
    def rows_per_s(self) -> float:
        return self.new / self.elapsed_s if self.elapsed_s > 0 else 0.0

    @property
    def left_s(self) -> float | None:
        """Seconds until the end, at the speed so far; None where nobody knows."""
        if self.fraction is None or self.fraction <= self.began_at:
            return None
        return self.elapsed_s * (1 - self.fraction) / (self.fraction - self.began_at)


@dataclass(frozen=True, kw_only=True)
class Summary:
    """What was done. ``rows``: answers in all; ``new``: those of this process, at ``samples_per_s`` without the start."""

    rows: int
    new: int
    samples_per_s: float
    batch_size: int
    replicas: int
    replica_deaths: int
    why: str


class Sink(Protocol):
    """Where answers go, in order."""

    def put(self, answers: Answers, mark: str | None) -> None:
        """Take the next answers; ``mark``: the data's behind them, see ``PartFile.append``."""
        ...

    def settle(self) -> None:
        """What was taken so far has to be safe now: everything is answered, or something went wrong."""
        ...


class Kept:
    """Answers that stay in memory. ``arrays()`` gives them by name."""

    def __init__(self, signature: ModelSignature) -> None:
        self._outputs = signature.outputs
        self._parts: list[list[Any]] = []

    def put(self, answers: Answers, mark: str | None) -> None:
        readable = [floats(array, spec) for array, spec in zip(answers.outputs, self._outputs, strict=True)]
        self._parts.append(
            [trimmed(a, answers.lengths) if spec.free else a for a, spec in zip(readable, self._outputs, strict=True)]
        )

    def settle(self) -> None:
        return

    def arrays(self) -> dict[str, Any]:
        """All answers, BF16 as float32: an array for each output; a list of arrays for one whose rows have lengths."""
        return {
            spec.name: [row for part in parts for row in part] if spec.free else np.concatenate(parts)
            for spec, parts in zip(self._outputs, zip(*self._parts, strict=True), strict=True)
        }


class Filed:
    """Answers that are appended to a file."""

    def __init__(self, part: PartFile, form: Format) -> None:
        self._part = part
        self._format = form

    def put(self, answers: Answers, mark: str | None) -> None:
        if self._part.is_empty:
            self._part.append(self._format.head(), 0, None)
        self._part.append(self._format.encode(answers), len(answers.outputs[0]), mark)

    def settle(self) -> None:
        self._part.commit()


class Prediction:
    """One data set, answered by one model. Made, then ``run``; ``close`` ends everything that was started.

    Attributes:
        signature: what goes in and comes out.
        part: the file of answers, where there is one.
    """

    def __init__(
        self, bundle: str | Path, data: Any, out: Path | None, options: PredictOptions, say: Callable[[str], None]
    ) -> None:
        """Look at everything that was asked for, before a model is loaded; ``say`` hears of data that has to be fetched.

        Raises:
            TargetError: no such bundle.
            DataError: no such data, or it does not fit the model.
            RequestError: another argument that makes no sense, or ``out`` was begun with something else.
        """
        options.check()
        ((name, path),) = locate([str(bundle)]).items()
        suffix = None if out is None else suffix_of(out)
        if out is not None and isinstance(data, (str, os.PathLike)) and out.resolve() == Path(data).resolve():
            raise RequestError(f"{out} is the data itself; give another --out.")
        description = describe(path)
        self.signature = ModelSignature.from_description(name, description)
        can_be_served(self.signature)
        self._options = options
        self._closed = False
        self.part: PartFile | None = None
        self._crew = Crew(ModelSource(path, name), find_cores(), options.replicas)
        # The template imports torch while the data is looked at.
        self._crew.start()
        try:
            encode = _encoder(description.get("tokenizer"), self.signature)
            self.rows: Rows = open_rows(data, self.signature.inputs, out is not None, say, encode)
            if out is not None and suffix is not None:
                self.format = format_of(suffix, self.signature, self.rows.files() is not None)
                self.part = PartFile(out, self._origin(path), options.fresh)
                self._go_on(self.part)
        except BaseException:
            self.close()
            raise

    def _origin(self, path: Path) -> dict[str, str]:
        return {"another model": _checksum(path), "another --limit": str(self._options.limit)}

    def _go_on(self, part: PartFile) -> None:
        """Go past the rows that are answered already, which must be those of before."""
        note = part.note
        self.rows.skip(note.rows)
        other = self.rows.at != note.rows or (note.rows > 0 and self.rows.mark != note.mark)
        if part.finished_before and not other and self.rows.at != self._options.limit:
            other = self.rows.read(1) is not None
        if other:
            raise part.mismatch("other data")

    @property
    def answered_before(self) -> int:
        """Rows that an earlier process has answered."""
        return 0 if self.part is None else self.part.note.rows

    @property
    def total(self) -> int | None:
        """Rows in all, or None where only the end will tell."""
        total, limit = self.rows.total, self._options.limit
        return min(total, limit) if total is not None and limit is not None else total

    def run(self, sink: Sink, watch: Callable[[Progress], None] = lambda progress: None) -> Summary:
        """Answer everything that is not answered yet; ``watch`` is told how far it is, about ten times a second.

        Raises:
            DataError: a row makes no sense; those before it are answered and safe.
            JobFailed: the model failed on a row; those before it are answered and safe.
            UserCodeError: the model's own code raised while it was built.
        """
        crew = self._crew
        crew.load()
        crew.choose()
        pace = choose_pace(crew.measured_s, crew.layout, self.signature, self._options.batch_size)
        replicas = len(crew.ready())
        teller = _Teller(self, watch)

        def deliver(window: Window, outputs: Sequence[np.ndarray]) -> None:
            sink.put(Answers(outputs, window.files, window.lengths), window.mark)
            teller.count(len(window.slots))

        conveyor = Conveyor(crew, self.rows, pace, self._options.limit, deliver)
        try:
            conveyor.run(teller.tell)
        finally:
            sink.settle()
        return Summary(
            rows=teller.rows, new=teller.new, samples_per_s=teller.progress().rows_per_s, batch_size=pace.batch,
            replicas=replicas, replica_deaths=crew.deaths, why=crew.why,
        )  # fmt: skip

    def close(self) -> None:
        """End all processes and let go of the files; safe to call twice."""
        if self._closed:
            return
        self._closed = True
        self._crew.close()
        if hasattr(self, "rows"):
            self.rows.close()
        if self.part is not None:
            self.part.close()


class _Teller:
    """Counts answers, and tells ``watch`` now and then."""

    def __init__(self, prediction: Prediction, watch: Callable[[Progress], None]) -> None:
        self._prediction = prediction
        self._watch = watch
        self._began_s = self._told_s = time.monotonic()
        self._began_at = prediction.rows.fraction or 0.0
        self.rows = prediction.answered_before
        self.new = 0

    def count(self, rows: int) -> None:
        self.rows += rows
        self.new += rows

    def progress(self) -> Progress:
        total = self._prediction.total
        fraction = self.rows / total if total else self._prediction.rows.fraction
        return Progress(
            rows=self.rows, new=self.new, elapsed_s=time.monotonic() - self._began_s, total=total, fraction=fraction,
            began_at=self._began_at,
        )  # fmt: skip

    def tell(self) -> None:
        now = time.monotonic()
        if now - self._told_s > _TELL_EVERY_S:
            self._told_s = now
            self._watch(self.progress())


def choose_pace(
    measured_s: Mapping[int, float], layout: SlotLayout, signature: ModelSignature, wanted: int | None
) -> Pace:
    """Return how rows are put together.

    Args:
        measured_s: seconds for a batch by its size, in rows, or units where rows have lengths.
        layout: how many rows a replica and the memory take.
        signature: of the model.
        wanted: how many rows to compute together; None for what is cheapest.

    Raises RequestError where what was asked for is too much.
    """
    latency, most = LatencyModel.from_measured(measured_s), layout.max_batch
    if wanted is not None and wanted > most:
        raise RequestError(f"A batch of {wanted:,} rows is more than a replica takes; give at most {most}.")
    if signature.longest is not None:
        units = wanted * signature.units(signature.longest) if wanted else latency.cheapest_batch(max(measured_s))
        # Long enough to find rows of a length; room for the next one while this one is computed.
        return Pace(window=min(_WINDOW, layout.slots // 2), batch=wanted or most, units=units)
    size = wanted or latency.cheapest_batch(most)
    took_s = latency.predict(size)
    if size > 1 and took_s > _LONGEST_BATCH_S:
        raise RequestError(f"A batch of {size} rows would take {took_s:.0f} s; give a smaller --batch-size.")
    return Pace(window=size, batch=size, units=size)


def _encoder(tokenizer: Any, signature: ModelSignature) -> Encode | None:
    """What makes texts to rows; None for a model without a tokenizer."""
    if tokenizer is None or signature.longest is None:
        return None
    try:
        from shoal.serve.protocols.embeddings import TextEncoder

        encoder = TextEncoder(str(tokenizer), signature)
    except ImportError:
        raise RequestError('Texts need tokenizers; install it with "pip install shoal[text]".') from None
    # The library has one kind of error for all files that are none of its own.
    except Exception as error:
        raise RequestError(f"The tokenizer of {signature.name} cannot be read ({error}); fetch the model again.") from None

    def encode(text: str) -> tuple[np.ndarray, ...]:
        (tokens,) = encoder.tokens([text])
        return tuple(array[0] for array in encoder.request(tokens).inputs)

    return encode


def predict(
    bundle: str | Path, data: Any, out: str | Path | None = None, *, replicas: int | None = None,
    batch_size: int | None = None, limit: int | None = None, fresh: bool = False,
    on_progress: Callable[[Progress], None] = lambda progress: None,
) -> dict[str, Any] | Path:  # fmt: skip
    """Answer a whole data set with a finished model, in parallel.

    Args:
        bundle: a bundle, a run directory, or a job's name for its latest run.
        data: a path (``.csv``, ``.jsonl``, ``.txt``, ``.npy``, ``.npz``, ``.safetensors``, ``.pt``, a folder of pictures),
            "cifar10", an array or tensor, a mapping of them by the inputs' names, a data set as ``shoal.Job`` takes it, or a
            list of texts.
        out: a file for the answers (``.jsonl``, ``.csv``, ``.npz``, ``.safetensors``). A call that was interrupted or killed goes
            on where it was when it is made again.
        replicas, batch_size: None finds out by measurement.
        limit: answer so many rows, from the first.
        fresh: begin again where ``out`` was begun or exists.
        on_progress: is told how far it is, about ten times a second.

    Returns:
        The path of ``out``; without it the answers: the name of each output -> an array with as many rows as the data
        (a list of arrays where each is as long as its row).

    Raises:
        RequestError: an argument, the data (``DataError``) or the bundle (``TargetError``) makes no sense.
        JobFailed: the model failed; what was answered before is kept in ``out``'s part.
    """
    options = PredictOptions(replicas=replicas, batch_size=batch_size, limit=limit, fresh=fresh)
    prediction = Prediction(bundle, data, None if out is None else Path(out), options, lambda line: None)
    try:
        if prediction.part is None:
            kept = Kept(prediction.signature)
            prediction.run(kept, on_progress)
            return kept.arrays()
        if not prediction.part.finished_before:
            prediction.run(Filed(prediction.part, prediction.format), on_progress)
            prediction.part.finish(prediction.format)
        return prediction.part.out
    finally:
        prediction.close()


def _checksum(directory: Path) -> str:
    """Of all files of a bundle."""
    total = hashlib.sha256()
    for path in sorted(entry for entry in directory.iterdir() if entry.is_file()):
        total.update(f"{path.name}\0{os.path.getsize(path)}\0".encode(errors="surrogateescape"))
        with path.open("rb") as file:
            while piece := file.read(1 << 20):
                total.update(piece)
    return total.hexdigest()
