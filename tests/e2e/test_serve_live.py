"""A service that follows a run by its servers' updates: answers change while it trains, each of one whole update; none fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

import shoal
from shoal import bundle

_JOB = """\
import torch
import shoal


class Same(torch.nn.Module):
    # Two parameters and a row that every step changes alike: half an update would show.
    def __init__(self):
        super().__init__()
        self.a, self.b = (torch.nn.Parameter(torch.zeros(4096)) for _ in range(2))
        self.rows = shoal.ps.Embedding(8, optimizer=shoal.ps.SGD(lr=0.125), init=shoal.ps.Zeros())

    def forward(self, keys):
        rows = self.rows(keys)
        return torch.stack([self.a.mean() + 0 * rows[:, 0], self.b.mean() + 0 * rows[:, 0], rows.mean(1)], 1)


def data():
    return torch.full((64,), 7), torch.zeros(64)


# Of each the mean rises by 1/8 a step, without rounding.
def loss(output, target):
    return -(output @ torch.tensor([4096.0, 4096.0, 8.0])).mean()


job = shoal.Job(name="online", model=Same, train_data=data, loss=loss, batch_size=16, epochs=100000,
                optimizer=lambda params: torch.optim.SGD(params, lr=0.125))
"""


class Online:
    """The run, in a process of its own."""

    def __init__(self, place: Path) -> None:
        (place / "online.py").write_text(_JOB)
        self._place = place
        self.process: subprocess.Popen[bytes] | None = None

    def start(self, *more: str) -> None:
        command = [sys.executable, "-m", "shoal", "train", "online.py:job", "--run", "run", *more]
        self.process = subprocess.Popen(command, cwd=self._place, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def stop(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)
        self.process.wait(60)


@pytest.fixture
def online(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Online]:
    monkeypatch.setenv("SHOAL_CHECKPOINT_S", "1")
    monkeypatch.setenv("SHOAL_EXPORT", "0")
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).resolve().parents[2]))
    made = Online(tmp_path)
    yield made
    if made.process is not None and made.process.poll() is None:
        made.stop(signal.SIGKILL)


def until(true: Callable[[], object], what: str, within_s: float = 60.0) -> None:
    deadline = time.monotonic() + within_s
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)


class Asker(threading.Thread):
    """Asks all the time, and keeps what came."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self._client = shoal.Client(url)
        self.answers: list[np.ndarray] = []
        self.failures: list[Exception] = []
        self.stopped = False

    def run(self) -> None:
        while not self.stopped:
            try:
                self.answers.append(self._client.infer(np.full(1 + len(self.answers) % 3, 7))["output"])
            except Exception as error:
                self.failures.append(error)
            time.sleep(0.002)

    @property
    def last(self) -> float:
        return float(self.answers[-1][0, 0]) if self.answers else -1.0

    def rises(self, what: str) -> None:
        """Wait until answers have changed several times."""
        for _ in range(4):
            before = self.last
            until(lambda: self.last > before, what)  # noqa: B023


def _update(url: str, direct: bool = True) -> int:
    """What an answer says of the update of the run that it was computed with: in its head and in its body. Mean = N / 8."""
    tensor = {"name": "input", "datatype": "INT64", "shape": [1], "data": [7]}
    headers = {} if direct else {"X-Shoal-Timeout-Ms": "20000"}
    asked = urllib.request.Request(f"{url}/v2/models/online/infer", json.dumps({"inputs": [tensor]}).encode(), headers)
    with urllib.request.urlopen(asked) as answer:
        said, body = int(answer.headers["shoal-update"]), json.load(answer)
    assert body["parameters"] == {"shoal_update": said} and body["model_version"]
    # The run counts whole steps, each of which adds an eighth.
    assert body["outputs"][0]["data"][0] * 8 >= said
    return said


def pids(service: shoal.serve.service.RunningService, role: str) -> list[int]:
    return [row["pid"] for row in service.processes() if row["role"] == role]


def test_answers_keep_up_with_the_run(tmp_path: Path, online: Online) -> None:
    online.start("--plan", "ps=1,workers=1,sync,threads=1")
    run = tmp_path / "run"
    until(lambda: (run / "job.json").exists(), "the run to begin")
    service = shoal.serve(follow=run, replicas=2, slo_ms=20_000)
    with service:
        client = shoal.Client(service.url)
        until(client.ready, "the first weights")
        asker = Asker(service.url)
        asker.start()
        asker.rises("answers to change")
        status = json.load(urllib.request.urlopen(f"{service.url}/v2/models/online/stats"))["model_stats"][0]
        version, weights = status["version"], status["shoal"]["weights"]
        assert weights["following"] and weights["updates"] > 2 and weights["age_s"] < 30
        assert _update(service.url, direct=False) <= _update(service.url) <= _update(service.url, direct=False)
        page = urllib.request.urlopen(f"{service.url}/metrics").read().decode()
        assert 'shoal_weights_updates_total{model="online"}' in page and 'shoal_weights_age_seconds{model="online"}' in page

        # Whoever is killed is put back, and it goes on.
        os.kill(pids(service, "follower")[0], signal.SIGKILL)
        os.kill(pids(service, "replica")[0], signal.SIGKILL)
        asker.rises("answers to change after the follower's death")

        # One that is silent for a while is lost, and found again.
        assert online.process is not None
        online.process.send_signal(signal.SIGSTOP)
        until(lambda: service.numbers()["online"]["follows"]["by"] == "checkpoints", "the silence to be noticed")
        online.process.send_signal(signal.SIGCONT)
        until(lambda: service.numbers()["online"]["follows"]["by"] == "updates", "the run to be heard again")
        asker.rises("answers to change after the silence")

        def is_back() -> bool:
            # What the gateway says of it comes twice a second. On a busy machine it may have been silent for as long before.
            numbers = service.numbers()["online"]
            weights = numbers.get("weights") or {"following": False}
            return bool(numbers["version"] != version and weights["following"] and weights["tries"]) and (
                numbers["follows"]["lost"] == weights["lost"] >= 1
            )

        until(is_back, "the statistics to say so")
        version = service.numbers()["online"]["version"]

        # A run that is gone leaves its last weights in use.
        online.stop(signal.SIGKILL)
        until(lambda: not service.numbers()["online"]["weights"]["following"], "the loss of the run to be noticed")
        kept = asker.last
        time.sleep(0.3)
        assert asker.last >= kept > 0

        # Resumed, it is followed again, as a version of its own, and at last as the finished model.
        online.start("--resume")
        until(lambda: service.numbers()["online"]["version"] != version, "the resumed run to be followed")
        asker.rises("answers to change again")
        online.stop(signal.SIGTERM)
        final = bundle.load(run / "model")
        right = float(final.a.detach().mean())
        until(lambda: asker.last == right, f"the run's own answers {right}")
        asker.stopped = True
        asker.join()
    assert not asker.failures
    answers = np.concatenate(asker.answers)
    assert (answers == answers[:, :1]).all() and len(np.unique(answers[:, 0])) > 1


def test_a_run_whose_processes_share_no_memory_is_kept_up_with(
    tmp_path: Path, online: Online, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHOAL_TRANSPORT", "group")
    online.start("--plan", "ps=2,workers=1,sync,threads=1")
    run = tmp_path / "run"
    until(lambda: (run / "job.json").exists(), "the run to begin")
    with shoal.serve(follow=run, slo_ms=20_000) as service:
        until(shoal.Client(service.url).ready, "the first weights")
        asker = Asker(service.url)
        asker.start()
        asker.rises("answers to change")
        # The first weights may be those of a checkpoint.
        until(lambda: (service.numbers()["online"].get("weights") or {}).get("following"), "the run itself to be followed")
        online.stop(signal.SIGTERM)
        right = float(bundle.load(run / "model").a.detach().mean())
        until(lambda: asker.last == right, f"the run's own answers {right}")
        asker.stopped = True
        asker.join()
    assert not asker.failures
    answers = np.concatenate(asker.answers)
    assert (answers == answers[:, :1]).all() and len(np.unique(answers[:, 0])) > 1
