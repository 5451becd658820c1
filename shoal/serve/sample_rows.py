"""Rows to compare two ways of computing a model on: as real as can be had."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from shoal import bundle
from shoal.errors import ShoalError, TargetError
from shoal.serve.load_inputs import random_inputs
from shoal.serve.protocols.embeddings import TextEncoder
from shoal.serve.signature import ModelSignature

_ROWS = 32
Row = tuple[np.ndarray, ...]

_TEXTS = (
    "Yes.", "What time does the last train leave?", "The museum is closed on Mondays, except in July and August.",
    "ERROR 503: no replica is ready; try again in 1 s", "def mean(xs): return sum(xs) / len(xs)",
    "A man is playing a guitar on a small stage while two dancers move slowly in front of him.",
    "How do I return a pair of shoes that I bought two weeks ago without the receipt?",
    "Das Wetter wird morgen wechselhaft, mit Schauern am Nachmittag.", "今天的会议改到下午三点。", "¿Dónde está la biblioteca?",
    "The committee decided, after a long discussion about costs and risks, to postpone the opening of the bridge by a year.",
    "Quarterly revenue rose 14.2 % to $3.81 billion, ahead of what analysts had expected.", "loooove it!!! 😍😍",
    "Photosynthesis turns light, water and carbon dioxide into sugar and oxygen.", "not bad, not good either",
    "To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer the slings and arrows of fortune.",
    "cheap flights lisbon to oslo march", "The patient was given 5 mg of the drug twice a day for three weeks.",
    "https://example.org/a/b?c=1&d=2", "She said that he said that they would never have said it.", "7 + 5 = 12",
    "Please find attached the minutes of our last meeting; comments are welcome until Friday noon.", "one two three four five",
    "Many workers, one model: the queue grows, the batch grows with it, and nobody waits longer than was promised.",
)  # fmt: skip


def sample_rows(
    directory: Path, description: Mapping[str, Any], signature: ModelSignature
) -> tuple[list[Row], str]:
    """Return up to 32 rows, each with a batch dim of 1, and what they are.

    Those of the file that the bundle names as ``samples`` (any that ``shoal predict`` reads), else texts for a model with a
    tokenizer, else what the model's job is evaluated on, where that can be had, else random numbers.

    Raises TargetError where the named file is of no use.
    """
    named = description.get("samples")
    if named is not None:
        try:
            return _read(directory / str(named), signature), str(named)
        except (ShoalError, OSError) as error:
            raise TargetError(f"The samples of the bundle {directory.name} cannot be used: {error}") from None
    if description.get("tokenizer") is not None:
        encoder = TextEncoder(str(description["tokenizer"]), signature)
        if len(signature.inputs) == len(encoder.request([0]).inputs):
            tokens = encoder.tokens(_TEXTS)
            return [encoder.request(row).inputs for row in tokens], f"{len(tokens)} texts"
    try:
        job = bundle.load_job(directory)
        data = None if job is None else job.eval_data
        found = _read(data() if callable(data) else data, signature) if data is not None else []
    except Exception:
        # Somebody's code, perhaps for data that is not on this machine.
        found = []
    if found:
        return found, f"{len(found)} rows of the job's evaluation data"
    made = np.random.default_rng(0)
    rows = [tuple(array for _, _, array in random_inputs(signature.metadata(), made)) for _ in range(_ROWS)]
    return rows, f"{_ROWS} rows of random numbers"


def _read(data: Any, signature: ModelSignature) -> list[Row]:
    from shoal.serve.tables.opened import open_rows

    opened = open_rows(data, signature.inputs, False, lambda line: None)
    try:
        columns = opened.read(_ROWS)
        lengths = opened.lengths()
    finally:
        opened.close()
    return [] if columns is None else [_row(columns, k, lengths, signature) for k in range(len(columns[0]))]


def _row(
    columns: Sequence[np.ndarray], k: int, lengths: np.ndarray | None, signature: ModelSignature
) -> Row:
    specs = zip(columns, signature.inputs, strict=True)
    return tuple(
        column[k : k + 1, : lengths[k]] if spec.free and lengths is not None else column[k : k + 1]
        for column, spec in specs
    )
