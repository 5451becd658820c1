"""The models of benchmarks/serve.py with no server: ``python bare.py NAME`` prints one JSON line.

``cifar``: seconds for one picture on one thread. ``minilm``: sentences a second, sorted by length within windows of 128.
"""

from __future__ import annotations

import json
import os
import sys
import time
from statistics import median

import numpy as np
import torch

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
from served import Cifar, MiniLM, make  # noqa: E402

_WINDOW, _BATCH, _WARM_S = 128, 16, 1.0


def cifar(model: Cifar) -> dict[str, float]:
    picture = np.random.default_rng(0).random((3, 32, 32), dtype=np.float32)
    times = []
    until = time.perf_counter() + 2 * _WARM_S
    while time.perf_counter() < until:
        start = time.perf_counter()
        model([picture])
        times.append(time.perf_counter() - start)
    return {"seconds": median(times[len(times) // 2 :])}


def minilm(model: MiniLM, texts: list[str], seconds: float) -> dict[str, float]:
    lengths = [len(ids) for ids in model.tokenizer(texts)["input_ids"]]
    done, began = 0, 0.0
    until = time.perf_counter() + _WARM_S + seconds
    while time.perf_counter() < until:
        if not began and time.perf_counter() > until - seconds:
            began, done = time.perf_counter(), 0
        start = done % len(texts)
        window = sorted(range(start, min(start + _WINDOW, len(texts))), key=lambda k: lengths[k])
        for first in range(0, len(window), _BATCH):
            model([texts[k] for k in window[first : first + _BATCH]])
        done += len(window)
    return {"per_s": done / (time.perf_counter() - began)}


def main() -> None:
    torch.manual_seed(0)
    model = make()
    if isinstance(model, Cifar):
        print(json.dumps(cifar(model)))
    else:
        with open(sys.argv[1], encoding="utf-8") as file:
            print(json.dumps(minilm(model, json.load(file), float(sys.argv[2]))))


if __name__ == "__main__":
    main()
