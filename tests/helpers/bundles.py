"""Small bundles to serve, written without training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from shoal import bundle

_SOURCE = """\
import os
import signal
import time

import torch
from torch import nn

GATE = "the gate"


class Odd(nn.Module):
    \"\"\"A linear layer; a row that begins with 255 raises, with 254 kills the process, with 253 takes half a second.

    A row of nothing but 252 waits until the gate is there: a file.
    \"\"\"

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(12, 5)

    def forward(self, x):
        asked = x[:, 0, 0]
        if bool((asked == 255).any()):
            raise ValueError("a secret of the model")
        if bool((asked == 254).any()):
            os.kill(os.getpid(), signal.SIGKILL)
        if bool((asked == 253).any()):
            time.sleep(0.5)
        until = time.monotonic() + 60
        while bool((x == 252).flatten(1).all(1).any()) and not os.path.exists(GATE) and time.monotonic() < until:
            time.sleep(0.005)
        return self.linear(x.flatten(1).float() / 255)


class Two(nn.Module):
    \"\"\"Two named inputs, two outputs.\"\"\"

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, left, right):
        return {"sum": self.scale * (left + right), "count": torch.full((len(left),), 7)}
"""


def gate(directory: Path) -> Path:
    """The file that rows of 252 wait for, of a bundle that lies here (or of a copy of it)."""
    return directory.parent / "gate"


def odd(directory: Path) -> Path:
    """Write a bundle of ``Odd``: UINT8 rows of 3 × 4 in, 5 numbers out."""
    return _write(directory, "odd", "Odd", {
        "inputs": [{"name": "input", "dtype": "UINT8", "shape": [-1, 3, 4]}],
        "outputs": [{"name": "output", "dtype": "FP32", "shape": [-1, 5]}],
    })  # fmt: skip


def two(directory: Path) -> Path:
    """Write a bundle of ``Two``."""
    return _write(directory, "two", "Two", {
        "inputs": [{"name": "left", "dtype": "FP32", "shape": [-1, 2]}, {"name": "right", "dtype": "FP32", "shape": [-1, 2]}],
        "outputs": [{"name": "sum", "dtype": "FP32", "shape": [-1, 2]}, {"name": "count", "dtype": "INT64", "shape": [-1]}],
    })  # fmt: skip


def _write(directory: Path, name: str, kind: str, tensors: dict[str, Any]) -> Path:
    source = directory.parent / f"{name}_code.py"
    directory.parent.mkdir(parents=True, exist_ok=True)
    source.write_text(_SOURCE.replace('"the gate"', repr(str(gate(directory)))))
    names: dict[str, Any] = {}
    exec(_SOURCE, names)
    torch.manual_seed(1)
    state = names[kind]().state_dict()
    bundle.write(
        directory, state, {"name": name, "factory": f"{source.stem}:{kind}", "labels": None, **tensors}, source
    )
    return directory
