"""Describing what goes into a model and what comes out, and exporting it as a program that needs no code."""

from __future__ import annotations

import contextlib
import io
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from shoal.data import Images
from shoal.process.failure import user_code
from shoal.train import objective
from shoal.train.built import Built

_DTYPES = {torch.float32: "FP32", torch.float64: "FP64", torch.float16: "FP16", torch.bfloat16: "BF16",
           torch.int64: "INT64", torch.int32: "INT32", torch.int16: "INT16", torch.int8: "INT8",
           torch.uint8: "UINT8", torch.bool: "BOOL"}  # fmt: skip


def describe_model(built: Built, program: str | None) -> dict[str, Any]:
    """Return ``inputs``, ``outputs`` and ``labels`` for bundle.json, and write the exported program where asked.

    Two samples of the training data go through the model: a dim that is 2 in both inputs and outputs is the batch.
    Nothing is written where torch cannot export the model; ``program`` in the result says whether it was.
    """
    described: dict[str, Any] = {"inputs": [], "outputs": [], "program": False, "labels": _labels(built), "preprocess": None}
    count = min(2, len(built.train))
    model = built.model
    was_training = model.training
    model.eval()
    try:
        with user_code("the model or its data"), torch.no_grad():
            batch = built.train.fetch(np.arange(count, dtype=np.int64), built.job.collate, None)
            inputs, output = _pass(built, batch)
        described["inputs"] = _tensors(inputs, "input", count)
        described["outputs"] = _tensors(output, "output", count)
        if isinstance(built.train, Images) and built.job.collate is None:
            described["preprocess"] = built.train.preprocess
        if program is not None:
            described["program"] = _export(model, inputs, count, program)
    finally:
        model.train(was_training)
    return described


def _pass(built: Built, batch: Any) -> tuple[Any, Any]:
    """What goes into the model and what comes out of it; a job's own step decides what it calls the model with."""
    model, job = built.model, built.job
    if job.step is None:
        inputs, _ = objective.split(batch)
        return inputs, objective.call(model, inputs)
    calls: list[tuple[Any, Any]] = []

    def note(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        named: Any = {**{f"input_{k}": value for k, value in enumerate(args)}, **kwargs}
        calls.append((named if kwargs else args[0] if len(args) == 1 else args, output))

    handle = model.register_forward_hook(note, with_kwargs=True)
    try:
        job.step(model, batch)
    finally:
        handle.remove()
    return calls[0] if calls else ((), ())


def _labels(built: Built) -> list[str] | None:
    classes = built.train.classes
    return [str(c) for c in classes] if classes else None


def _tensors(value: Any, name: str, count: int) -> list[dict[str, Any]]:
    """[{name, dtype, shape}] of every tensor in a value, -1 for the batch."""
    if isinstance(value, torch.Tensor):
        shape = [-1 if k == 0 and size == count else size for k, size in enumerate(value.shape)]
        return [{"name": name, "dtype": _DTYPES.get(value.dtype, str(value.dtype)), "shape": shape}]
    if isinstance(value, Mapping):
        return [entry for key, item in value.items() for entry in _tensors(item, str(key), count)]
    if isinstance(value, (tuple, list)):
        return [entry for k, item in enumerate(value) for entry in _tensors(item, f"{name}_{k}", count)]
    return []


def _export(model: nn.Module, inputs: Any, count: int, path: str) -> bool:
    """Export with a free batch size; False where torch cannot."""
    args, kwargs = ((), dict(inputs)) if isinstance(inputs, Mapping) else (inputs, {})
    if not isinstance(args, tuple):
        args = (args,)
    if count < 2:
        return False
    batch = torch.export.Dim.AUTO

    def free(value: Any) -> Any:
        return {0: batch} if isinstance(value, torch.Tensor) and value.dim() and value.shape[0] == count else None

    shapes: Any = {key: free(v) for key, v in kwargs.items()} if kwargs else tuple(free(v) for v in args)
    # What torch says while it tries is of no use to somebody who only wanted to train.
    with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
        try:
            exported = torch.export.export(model, args, kwargs, dynamic_shapes=shapes)
            torch.export.save(exported, path)
        except Exception:
            return False
    return True
